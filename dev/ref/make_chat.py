"""Makes test/vectors/chat.txt: what DeepSeek's own encoders make of conversations.

    pip install deepseek-recipe
    python dev/ref/make_chat.py --encoder DIR/encoding/encoding_dsv4.py

The encoder is the file in the released model's folder. What only the -0731 release has (its
reasoning efforts) comes from DeepSeek's package deepseek-recipe 0.1.1, which also checks the tools'
text. Three lines per case: the --loss-on word and which release; the row; a JSON string of the text
with its supervised spans between U+E000 and U+E001.

A span is what deepseek-v4-flash.md section 8 says: all behind <｜Assistant｜> and <think> or
</think>, up to and including EOS. It is found in the finished text, not by walking the messages.
"""
import argparse
import importlib.util
import json
import os
import random
import re

VECTORS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "test", "vectors")
EOS = "<｜end▁of▁sentence｜>"
SPAN = re.compile(r"(<｜Assistant｜>(?:<think>|</think>)(?:<｜action｜>)?"
                  r"|<｜(?:query|authority|domain|title|read_url)｜>)(.*?" + EOS + ")", re.DOTALL)

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather \"now\" in a\tcity: 天气", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"], "ratio": 0.5, "none": None, "yes": True,
        "list": [1, -2.50, 1e3, {}]}}}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {
    "type": "object", "properties": {}}}}


def say(role, content=None, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, number):
    return {"id": f"call_{number}", "type": "function",
            "function": {"name": name, "arguments": arguments}}


CALLS = [call("weather",
              '{"city": "Köln \\"x\\"", "days": 3, "l": [1, {"k": null}], "f": 1.50}', 1),
         call("time", "{}", 2), call("time", "not JSON", 3)]
TALK = [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Hello!"),
        say("user", "1+1?\n"), say("assistant", "2")]
THOUGHTS = [say("user", "a"), say("assistant", "b", reasoning_content="ra"), say("user", "c"),
            say("user", "d"), say("assistant", "e", reasoning_content="rb\n\nrc")]
TOOLS = [say("system", "S", tools=[WEATHER, TIME]), say("user", "q"),
         say("assistant", None, reasoning_content="r", tool_calls=CALLS),
         say("tool", "two", tool_call_id="call_2"), say("tool", "one", tool_call_id="call_1"),
         say("user", "and?"),
         say("tool", [{"type": "text", "text": "x"}, {"type": "image"}], tool_call_id="call_3"),
         say("assistant", "done", reasoning_content="so"), say("user", "thanks"),
         say("assistant", "bye")]
DEVELOPER = [say("developer", "first", tools=None), say("assistant", "1", reasoning_content="x"),
             say("developer", "then", response_format={"type": "object", "b": [True, None]}),
             say("assistant", "2", reasoning_content="y")]

# (loss-on, options, messages); options are encode_messages' arguments.
CASES = [
    ("assistant", {"thinking_mode": "chat"}, TALK),
    ("last", {"thinking_mode": "chat"}, TALK),
    ("completion", {"thinking_mode": "chat"}, TALK),
    ("all", {"thinking_mode": "chat"}, TALK),
    ("assistant", {"thinking_mode": "thinking"}, TALK),
    ("assistant", {"thinking_mode": "chat"}, THOUGHTS),
    ("assistant", {"thinking_mode": "thinking"}, THOUGHTS),
    ("assistant", {"thinking_mode": "thinking", "drop_thinking": False}, THOUGHTS),
    ("assistant", {"thinking_mode": "thinking", "reasoning_effort": "max"}, TALK),
    ("assistant", {"thinking_mode": "thinking", "reasoning_effort": "high"}, THOUGHTS),
    ("assistant", {"thinking_mode": "chat", "reasoning_effort": "max"}, THOUGHTS),
    ("assistant", {"thinking_mode": "thinking"}, TOOLS),
    ("assistant", {"thinking_mode": "chat"}, TOOLS),
    ("completion", {"thinking_mode": "thinking"}, TOOLS[:-2]),
    ("completion", {"thinking_mode": "thinking"}, TOOLS[:5] + TOOLS[7:8]),
    ("last", {"thinking_mode": "thinking"}, TOOLS[:5] + TOOLS[7:8]),
    ("all", {"thinking_mode": "thinking"}, DEVELOPER),
    ("assistant", {"thinking_mode": "thinking", "drop_thinking": False}, DEVELOPER),
    ("assistant", {"thinking_mode": "chat"}, DEVELOPER),
    ("all", {"thinking_mode": "chat"}, [say("user", "u"), say("latest_reminder", "now"),
                                        say("assistant", "a")]),
    ("all", {"thinking_mode": "thinking"}, [say("user", "u"), say("latest_reminder", "now"),
                                            say("user", "v"), say("assistant", "a")]),
    ("assistant", {"thinking_mode": "chat"}, [say("user", "a long talk", task="title"),
                                              say("user", "b"), say("assistant", "Talk")]),
    ("assistant", {"thinking_mode": "chat"}, [say("user", "talk", task="title"),
                                              say("assistant", "Talk")]),
    ("assistant", {"thinking_mode": "thinking"}, [say("user", "search?", task="action"),
                                                  say("assistant", "Search")]),
    ("assistant", {"thinking_mode": "chat"}, [say("user", "u"), say("assistant", "a", wo_eos=True),
                                              say("assistant", "b")]),
    ("all", {"thinking_mode": "chat"}, [say("assistant", "I begin."), say("user", "u"),
                                        say("assistant", None)]),
    ("assistant", {"thinking_mode": "chat"}, [say("user", "no answer")]),
    ("assistant", {"thinking_mode": "chat"}, [say("user", "\u0000\u001f\u2028\U0001f600 \\ \"/"),
                                              say("assistant", "\u007f\b\f\u0001")]),
]


VALUES = (1, "s", None, 1e22, 0.1, -0.0, 1e16, 9007199254740993.0, 123456789012345680.0, 1e-4,
          0.00012345, 1e-5, 1.5e-7, 1e15, 3.141592653589793, -2e300, 10**30)


def random_talk(rng):
    """Any order of roles, with tools and tasks now and then."""
    messages, calls = [], []
    for _ in range(rng.randint(1, 9)):
        role = rng.choice(["system", "user", "user", "assistant", "assistant", "tool", "developer",
                           "latest_reminder"])
        text = rng.choice(["x", "y\n", " z ", "„q“", "<b>", "{}"]) * rng.randint(1, 3)
        message = say(role, text)
        if role == "assistant":
            if rng.random() < 0.5:
                message["reasoning_content"] = rng.choice(["", "because", "r\n"])
            if rng.random() < 0.4:
                calls = [call("f", json.dumps({"k": rng.choice(VALUES)}), n)
                         for n in rng.sample(range(9), rng.randint(1, 3))]
                message["tool_calls"] = calls
        if role == "tool":
            message["tool_call_id"] = (rng.choice(calls)["id"] if calls and rng.random() < 0.8
                                       else "other")
        if role == "user" and rng.random() < 0.15:
            message["task"] = rng.choice(["title", "action", "query"])
        if role in ("system", "developer") and rng.random() < 0.15:
            message["tools"] = [TIME]
        messages.append(message)
    mode = {"thinking_mode": rng.choice(["chat", "thinking"])}
    if rng.random() < 0.3:
        mode["drop_thinking"] = False
    return "all", mode, messages


def mark(text, loss_on, messages):
    """The text with its spans marked; completion: the answers to the last question."""
    spans = [] if loss_on == "all" else list(SPAN.finditer(text))
    if loss_on == "last":
        spans = spans[-1:]
    if loss_on == "completion":
        roles = [message["role"] for message in messages]
        asked = max(i for i, role in enumerate(roles) if role in ("user", "developer"))
        spans = spans[-roles[asked:].count("assistant"):]
    for span in reversed(spans):
        begin, end = span.span(2)
        text = text[:begin] + "\ue000" + text[begin:end] + "\ue001" + text[end:]
    return text


def recipe_cases():
    """The -0731 efforts, and tools, by DeepSeek's package."""
    from deepseek_recipe import ChatCompletionRequest, ConversionOptions, DeepseekV4Encoding
    for effort in ("low", "high", "max"):
        for messages, tools in ((TALK[:2], None), (TALK[:2], [TIME])):
            body = {"model": "x", "messages": messages, "reasoning_effort": effort}
            if tools:
                body["tools"] = tools
            talk = ChatCompletionRequest(body).convert(ConversionOptions()).conversation
            text = DeepseekV4Encoding().render_conversation(talk).prompt
            row = {key: value for key, value in body.items() if key != "model"}
            yield "assistant", dict(row, thinking_mode="thinking"), text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("encoder", options.encoder)
    encoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoder)
    rng = random.Random(1)
    lines = []
    for number, (loss_on, mode, messages) in enumerate(CASES + [random_talk(rng)
                                                                for _ in range(150)]):
        text = encoder.encode_messages(messages, **mode)
        row = json.dumps({"messages": messages, **mode}, ensure_ascii=number % 2 == 0)
        lines += [f"{loss_on} preview", row, json.dumps(mark(text, loss_on, messages))]
    for loss_on, row, text in recipe_cases():
        lines += [f"{loss_on} 0731", json.dumps(row),
                  json.dumps(mark(text, loss_on, row["messages"]))]
    with open(os.path.join(VECTORS, "chat.txt"), "w") as file:
        file.write("\n".join(lines) + "\n")
    print(len(lines) // 3, "cases")


if __name__ == "__main__":
    main()
