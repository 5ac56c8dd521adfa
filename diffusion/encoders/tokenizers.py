"""Tokenizers: those of CLIP and T5, read from and written to folders of transformers, and ones fitted to captions.

A CLIP tokenizer is defined by its vocabulary, its merges and its special tokens; everything else of `tokenizer.json` is
the same for all (Radford et al. 2021, arXiv 2103.00020). A T5 tokenizer is its `tokenizer.json` as it is, or its
SentencePiece model (Raffel et al. 2020, arXiv 1910.10683). Tokens are those of transformers 5.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from diffusion.core import checks, files, model_folder
from diffusion.core.types import InputError, Text

logger = logging.getLogger(__name__)

CLASSES = {"CLIPTokenizer": "clip", "CLIPTokenizerFast": "clip", "T5Tokenizer": "t5", "T5TokenizerFast": "t5"}
GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")  # do not say whose tokenizer it is
LENGTHS = {"clip": 77, "t5": 512}
OTHER_FILES = {"clip": ("vocab.json", "merges.txt"), "t5": ("spiece.model",)}  # in place of tokenizer.json
LONGEST = 100_000  # transformers writes 1e30 where there is no limit
NAMED = {
    "clip": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
             "pad_token": "<|endoftext|>"},
    "t5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}  # fmt: skip
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PAD, BOS, EOS, SPECIAL = 0, 1, 2, 3  # the first ids of a fitted tokenizer, and their number
MOST_WARNINGS = 20


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps texts to integer tokens.

    It can be pickled, compared and stored (`to_text`).

    Attributes:
      kind: `clip`; `t5`; `sentencepiece`, which is T5's as a SentencePiece model; or `bytes` and `bpe`, see `fit`.
      model: What defines the tokenizer: the text of a `tokenizer.json`, a SentencePiece model in base64, or empty.
      vocabulary: Tokens are `0 .. vocabulary - 1`, including added ones.
      length: Number of tokens L of every text.
      pad, eos, bos: The tokens of the padding, the end and the start; `bos` is None for T5.
    """

    kind: Literal["clip", "t5", "sentencepiece", "bytes", "bpe"]
    model: str
    vocabulary: int
    length: int
    pad: int
    eos: int
    bos: int | None = None

    def __post_init__(self):
        checks.at_least(2, length=self.length)
        checks.at_most(LONGEST, self.length, "length")

    def __call__(self, texts: Sequence[str]) -> Text:
        """Returns int32 tokens `[N, L]` and a mask `[N, L]`, True up to and including the end.

        A text that is too long loses its last words, and a warning says which.
        """
        return self.arrange([self.encode(text) for text in texts])

    def arrange(self, rows: Sequence[Sequence[int]]) -> Text:
        """Returns what a call does, for tokens with start and end, of any number per text."""
        tokens = np.full((len(rows), self.length), self.pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(rows):
            if len(ids) > self.length:
                self._warn(ids)
                ids = [*ids[: self.length - 1], self.eos]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return Text(tokens, mask)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of one text, with start and end, however many they are."""
        text = text.encode(errors="replace").decode()  # a lone surrogate is no Unicode character
        if self.kind == "bytes":
            return [BOS, *(byte + SPECIAL for byte in text.encode()), EOS]
        if self.kind == "sentencepiece":
            return [*self._backend.encode(text), self.eos]
        ids = self._backend.encode(text).ids
        return [BOS, *ids, EOS] if self.kind == "bpe" else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones; that of CLIP is in lower case, with single spaces."""
        if self.kind in ("bytes", "bpe"):
            ids = [int(token) for token in ids if token >= SPECIAL]
        if self.kind == "bytes":
            return bytes(token - SPECIAL for token in ids).decode(errors="replace")
        text = self._backend.decode([int(token) for token in ids])
        return text.replace("</w>", " ").strip() if self.kind == "clip" else text

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what defines the tokenizer, in hexadecimal."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def to_text(self) -> str:
        """Returns the tokenizer as JSON, which `from_text` reads."""
        return json.dumps(dataclasses.asdict(self))

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # another process builds what is cached when it needs it

    @functools.cached_property
    def _backend(self) -> Any:
        if self.kind == "sentencepiece":
            import sentencepiece

            return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.model))
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.model)

    @functools.cached_property
    def _truncated(self) -> set[tuple[int, ...]]:
        return set()

    def _warn(self, ids: Sequence[int]) -> None:
        if tuple(ids) in self._truncated or len(self._truncated) == MOST_WARNINGS:
            return
        self._truncated.add(tuple(ids))
        words = self.decode(ids[self.length - 1 :])
        shown = words if len(words) <= 200 else f"{words[:200]} ..."
        last = "; no more texts are reported" if len(self._truncated) == MOST_WARNINGS else ""
        logger.warning("a text has more than %d tokens and loses its end: %r%s", self.length, shown, last)


def from_text(text: str) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.to_text` stored."""
    return Tokenizer(**json.loads(text))


def read(path: str, length: int | None = None, padding: str | None = None) -> Tokenizer:
    """Reads the tokenizer of CLIP or T5 from a folder as transformers 4 or 5 writes it.

    The padding is that of `special_tokens_map.json`, unless `tokenizer_config.json` has `added_tokens_decoder`, and
    then that of `tokenizer_config.json`. Where it is `!`, as for the OpenCLIP models of Stable Diffusion 2, XL and 3, a
    `!` in a text becomes the padding token too, as in transformers.

    Args:
      path: A folder with `tokenizer.json`, or `vocab.json` and `merges.txt`, or `spiece.model`.
      length: Number of tokens of every text, at least 2; None: the `model_max_length` of the folder, or else 77 for
        CLIP and 512 for T5.
      padding: The text of the padding token. None: that of the folder.

    Raises:
      InputError: A file is missing or cannot be read, or the tokenizer is neither CLIP's nor T5's.
    """
    config = _optional(path, "tokenizer_config.json")
    content = _optional(path, "tokenizer.json")
    kind = _kind(path, config, content)
    if length is None:
        length = config.get("model_max_length")
        length = int(length) if isinstance(length, (int, float)) and 2 <= length <= LONGEST else LENGTHS[kind]
    source = config if "added_tokens_decoder" in config else config | _optional(path, "special_tokens_map.json")
    named = {name: source.get(name) or default for name, default in NAMED[kind].items()}
    named |= {"pad_token": padding} if padding else {}
    try:
        if kind == "clip":
            content = _clip(path, config, content, named)
        elif content:
            content |= {"truncation": None, "padding": None}
        else:
            return _sentencepiece(path, length)
        ids = _ids(content)
        special = {name: ids[_content(token)] for name, token in named.items()}
        model = json.dumps(content, ensure_ascii=False)
        found = Tokenizer(kind, model, max(ids.values()) + 1, length, special["pad_token"], special["eos_token"],
                          special.get("bos_token"))  # fmt: skip
        _ = found._backend
    except InputError:
        raise
    except KeyError as error:
        raise InputError("path", f"the tokenizer in {path} lacks {error}") from error
    except Exception as error:  # `tokenizers` raises no narrower class
        raise InputError("path", f"the tokenizer in {path} is invalid: {error}") from error
    return found


def write(tokenizer: Tokenizer, folder: str) -> None:
    """Writes a tokenizer of CLIP or T5 as transformers reads it.

    That of CLIP has both layouts, `vocab.json` with `merges.txt`, and `tokenizer.json`.

    Raises:
      InputError: The tokenizer was fitted to captions.
    """
    if tokenizer.kind in ("bytes", "bpe"):
        raise InputError("tokenizer", "was fitted to captions; transformers has no such class")
    config = {"model_max_length": tokenizer.length, "tokenizer_class": "T5Tokenizer"}
    if tokenizer.kind == "sentencepiece":
        os.makedirs(folder, exist_ok=True)
        with files.replace(os.path.join(folder, "spiece.model"), "wb") as file:
            file.write(base64.b64decode(tokenizer.model))
        model_folder.write_json(folder, "tokenizer_config.json", config | NAMED["t5"] | {"extra_ids": 0})
        return
    content = json.loads(tokenizer.model)
    names = {token: text for text, token in _ids(content).items()}
    special = {"eos_token": names[tokenizer.eos], "pad_token": names[tokenizer.pad]}
    if tokenizer.kind == "clip":
        special |= {"bos_token": names[tokenizer.bos], "unk_token": content["model"]["unk_token"]}
        config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
        config["tokenizer_class"] = "CLIPTokenizer"
        _write_text(folder, "vocab.json", json.dumps(content["model"]["vocab"], ensure_ascii=False))
        _write_text(folder, "merges.txt", "\n".join(["#version: 0.2", *content["model"]["merges"], ""]))
    else:
        special["unk_token"] = names[content["model"]["unk_id"]]
        config["extra_ids"] = sum(text.startswith("<extra_id_") for text in names.values())
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in content["added_tokens"]}
    by_name = {token["content"]: {k: v for k, v in token.items() if k != "special"} for token in added.values()}
    _write_text(folder, "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=2))
    model_folder.write_json(
        folder, "special_tokens_map.json", {name: by_name.get(text, text) for name, text in special.items()}
    )
    model_folder.write_json(folder, "tokenizer_config.json", config | special | {"added_tokens_decoder": added})


def fit(
    captions: Iterable[str],
    kind: Literal["bytes", "bpe"] = "bpe",
    vocab_size: int = 1024,
    length: int = 64,
    lowercase: bool = False,
) -> Tokenizer:
    """Returns a tokenizer for captions. It depends on them alone: equal captions give an equal tokenizer.

    The tokens 0, 1 and 2 are the padding, the start and the end.

    Args:
      captions: The texts, of which `bytes` needs none.
      kind: `bytes`: the bytes of the text in UTF-8. `bpe`: byte-level byte-pair encoding (Sennrich et al. 2016, arXiv
        1508.07909), which can represent any text too.
      vocab_size: Maximum number of tokens of `bpe`, at least 259.
      length: Number of tokens of every text, at least 2.
      lowercase: Whether `bpe` ignores case.

    Raises:
      InputError: `vocab_size` or `length` is out of range, or there are no captions.
    """
    if kind == "bytes":
        return Tokenizer("bytes", "", 256 + SPECIAL, length, PAD, EOS, BOS)
    checks.at_least(256 + SPECIAL, vocab_size=vocab_size)
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for caption in captions:
            count += 1
            yield caption

    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise InputError("captions", "are none; a tokenizer cannot be fitted to them")
    content = json.loads(backend.to_str())
    content["added_tokens"] = []  # so that "<eos>" in a text is a text
    return Tokenizer("bpe", json.dumps(content, ensure_ascii=False), backend.get_vocab_size(), length, PAD, EOS, BOS)


def _optional(path: str, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file; empty if there is none."""
    if not os.path.exists(os.path.join(path, name)):
        return {}
    try:
        return model_folder.read_json(path, name)
    except InputError as error:
        raise InputError("path", error.problem) from None


def _kind(path: str, config: Mapping[str, Any], content: Mapping[str, Any]) -> Literal["clip", "t5"]:
    """Returns whose tokenizer is in a folder."""
    name, model = config.get("tokenizer_class"), content.get("model", {})
    kinds = [CLASSES[name]] if name in CLASSES else list(LENGTHS) if name in GENERIC else []
    if content and len(kinds) == 2:
        is_clip = model.get("type") == "BPE" and model.get("end_of_word_suffix") == "</w>"
        kinds = ["clip"] if is_clip else ["t5"] if model.get("type") == "Unigram" else []
    if not kinds:
        raise InputError("path", f"{path} has a {name or model.get('type')} tokenizer; must be a CLIP or T5 tokenizer")
    for kind in kinds:
        if content or all(os.path.exists(os.path.join(path, name)) for name in OTHER_FILES[kind]):
            return kind
    others = ", or ".join(" and ".join(OTHER_FILES[kind]) for kind in kinds)
    raise InputError("path", f"{path} has no tokenizer; it must contain tokenizer.json, or {others}")


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Returns all tokens of a `tokenizer.json` by their texts."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {text: token for token, (text, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in content["added_tokens"]}


def _clip(path: str, config: Mapping[str, Any], content: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `tokenizer.json` of a CLIP tokenizer, whatever files define it."""
    if content:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    else:
        vocab = _optional(path, "vocab.json")
        with open(os.path.join(path, "merges.txt"), encoding="utf-8", newline="\n") as file:
            merges = [line.rstrip("\r\n") for line in file if not line.startswith("#version")]
        merges = [merge for merge in merges if merge]
    known = _added_tokens(path, config, content)
    added = dict(known)
    for extra in config.get("extra_special_tokens") or config.get("additional_special_tokens") or ():
        added[_content(extra)] = _special(extra)
    for token in named.values():  # of two with the same text, the later one counts
        added[_content(token)] = known.get(_content(token)) or _special(token)
    next_id, tokens = len(vocab), []
    for text, token in added.items():
        tokens.append({"id": vocab.get(text, next_id), **token})
        next_id += text not in vocab
    ids = {token["content"]: token["id"] for token in tokens}
    bos, eos, unk = (_content(named[name]) for name in ("bos_token", "eos_token", "unk_token"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]},
        "post_processor": {"type": "RobertaProcessing", "sep": [eos, ids[eos]], "cls": [bos, ids[bos]],
                           "trim_offsets": False, "add_prefix_space": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges,
        },
    }  # fmt: skip


def _added_tokens(path: str, config: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the added tokens that the files of a folder list, by their texts."""
    if "added_tokens_decoder" in config:
        listed = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        older = sorted(_optional(path, "added_tokens.json").items(), key=lambda item: item[1])
        listed = [{"content": text, "normalized": True, "special": False} for text, _ in older]
        listed += content.get("added_tokens", [])
    flags = FLAGS | {"normalized": False, "special": False}
    return {
        token["content"]: {"content": token["content"]} | {flag: token.get(flag, flags[flag]) for flag in flags}
        for token in listed
    }


def _special(token: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a special token with its flags."""
    given = {"normalized": False} if isinstance(token, str) else {"normalized": True} | dict(token)
    flags = {flag: given.get(flag, default) for flag, default in FLAGS.items()}
    return {"content": _content(token), **flags, "normalized": given["normalized"], "special": True}


def _sentencepiece(path: str, length: int) -> Tokenizer:
    """Reads the SentencePiece model of a T5 tokenizer."""
    import sentencepiece

    with open(os.path.join(path, "spiece.model"), "rb") as file:
        content = file.read()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    model = base64.b64encode(content).decode()
    return Tokenizer("sentencepiece", model, processor.get_piece_size(), length, processor.pad_id(), processor.eos_id())


def _write_text(folder: str, name: str, text: str) -> None:
    os.makedirs(folder, exist_ok=True)
    with files.replace(os.path.join(folder, name)) as file:
        file.write(text)
