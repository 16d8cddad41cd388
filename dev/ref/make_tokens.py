# This docstring is training text of the test tokenizer: with another text, other tokens.
"""\
Makes test/vectors/tokenizer.json and tokens.txt: what Hugging Face's `tokenizers` makes of texts.

    python dev/ref/make_tokens.py [--megabytes 20]      (pip install tokenizers numpy)

tokenizer.json is a small byte-level BPE with DeepSeek-V4's three cuts. tokens.txt has one line per
answer, so that a test in C can compare without Python:

    scalars N SUM    the characters 4096 N .. 4096 N + 4095, each encoded on its own
    mixed N SUM      document N of mixed_text(), about 64 KiB
    pieces N BYTES   text N of PIECES: how many bytes each piece of it has

A SUM is sum((id + 1) * random_bits(0, i)) modulo 2^64; for scalars i = 16 * character + place, for
documents i = place. The texts are not stored: the test makes them with the same generator
(kernels.cu, section 1.5).
"""
import argparse
import json
import os

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import model as ref

VECTORS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "test", "vectors")
CUTS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
CONTROLS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",
            "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>",
            "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>",
            "<｜title｜>", "<｜read_url｜>")
PIECES = (
    "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ",
    "Hello, 世界", "S", "U1", "A1", "U2", "A2", "You are concise.",
    "Answer with one word: sky color?", "你好", "推理", "答案",
    "x  \n \t\n  y   z  ", "12345.678", "don't I'll <b>it's</b>", "ア・イ゛ーu゙",
    "\u0301a \u0301 \u200d\u200dB",
    "a\u3040b\u303f\u3041\u30ff\u3100c\u9fa5\u9fa6\u4dff\u4e00",
)

# What mixed_text draws from: a kind is a list of ranges; a run of one kind is 1 to 12 characters.
WORDS = (" the", " and", " of", " return", "if (", " = 0;\n", "\n    ", " int", "'s", " you",
         " 的", "。\n", " для", "; ", "://", " {\n", "}\n\n", ".5", "#include", " Größe",
         "ing", " über", "1,000", " été")
KINDS = (
    ((0x61, 0x7A),), ((0x20, 0x7E),), ((0x30, 0x39),), ((0x4E00, 0x9FFF),), ((0x3000, 0x30FF),),
    ((0x1F300, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F)), ((0x61, 0x7A), (0x300, 0x36F)),
    ((0x590, 0x6FF), (0x20, 0x20)),
    ((0x20, 0x20), (0x20, 0x20), (0x9, 0xD), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200B),
     (0x2028, 0x2029), (0x3000, 0x3000)), ((0, 0xD7FF), (0xE000, 0x10FFFF)),
    ((0x21, 0x2F), (0x3A, 0x40), (0x2010, 0x2027), (0x3001, 0x3011), (0xFF01, 0xFF0F)),
    ((0x400, 0x44F), (0x20, 0x20)),
    ((0x660, 0x669), (0x966, 0x96F), (0xB2, 0xB3), (0x2160, 0x2170)),
)


def mixed_text(document, least=65536):
    """UTF-8 of at least that many bytes; the C test makes the same."""
    bits = [int(b) for b in ref.random_bits(ref.random_key(document, "mixed"),
                                            np.arange(2 * least))]
    parts, size, i = [], 0, 0
    while size < least:
        kind, length = bits[i] % (len(KINDS) + 6), 1 + (bits[i] >> 32) % 12
        i += 1
        if kind >= len(KINDS):                      # more often than not, words
            parts.append(WORDS[(bits[i - 1] >> 40) % len(WORDS)])
        else:
            text = ""
            for _ in range(length):
                ranges = KINDS[kind]
                low, high = ranges[bits[i] % len(ranges)]
                text += chr(low + (bits[i] >> 32) % (high - low + 1))
                i += 1
            parts.append(text)
        size += len(parts[-1].encode())
    return "".join(parts)


def train():
    """A few hundred merges of mixed text; and some that make a token from other halves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([mixed_text(1000 + d) for d in range(8)] + [__doc__] * 20,
                                  trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    known = {tuple(m) for m in merges}
    others = sorted((token[:k], token[k:]) for token in vocabulary if len(token) > 2
                    for k in range(1, len(token))
                    if token[:k] in vocabulary and token[k:] in vocabulary
                    and (token[:k], token[k:]) not in known)
    for k, pair in enumerate(others[::3]):          # at any rank
        merges.insert(int(ref.random_bits(np.uint64(7), [k])[0]) % len(merges), list(pair))
    content["model"]["merges"] = [" ".join(m) if k % 2 else list(m) for k, m in enumerate(merges)]
    return content


def add_controls(content):
    first = len(content["model"]["vocab"])
    content["added_tokens"] = [
        {"id": first + k, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": k < 4} for k, text in enumerate(CONTROLS)]
    return content


def total(ids, first=0):
    ids = np.asarray(ids, dtype=np.uint64)
    return int(((ids + np.uint64(1))
                * ref.random_bits(np.uint64(0), first + np.arange(ids.size))).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    options = parser.parse_args()
    content = train()
    uniform = dict(content, model=dict(content["model"], merges=[
        m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]))
    tokenizer = Tokenizer.from_str(json.dumps(uniform))
    with open(os.path.join(VECTORS, "tokenizer.json"), "w") as file:
        json.dump(add_controls(content), file, ensure_ascii=True, separators=(",", ":"))
        file.write("\n")
    lines = []
    for block in range(272):
        characters = [c for c in range(4096 * block, 4096 * block + 4096)
                      if not 0xD800 <= c < 0xE000]
        answers = tokenizer.encode_batch([chr(c) for c in characters])
        lines.append(
            f"scalars {block} "
            f"{sum(total(a.ids, 16 * c) for c, a in zip(characters, answers)) % 2**64:016x}")
    for number, text in enumerate(PIECES):
        sizes = [len(text[a:b].encode())
                 for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        lines.append(f"pieces {number} {' '.join(map(str, sizes))}")
    for document in range(int(options.megabytes * 16)):
        lines.append(f"mixed {document} {total(tokenizer.encode(mixed_text(document)).ids):016x}")
        if document % 40 == 0:
            print(lines[-1], flush=True)
    with open(os.path.join(VECTORS, "tokens.txt"), "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
