"""Texts to tokens with the ``tokenizers`` package, an extra: ``pip install transfer_jax[text]``."""

import dataclasses
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Tokens(NamedTuple):
    """Tokenised texts.

    Attributes:
      inputs: int32 [N, L], padded at the end.
      lengths: int32 [N], tokens of each text.
      token_types: int32 [N, L], 1 in the second texts of pairs where the tokeniser says so.
    """

    inputs: np.ndarray
    lengths: np.ndarray
    token_types: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps texts to padded arrays of tokens and back.

    Attributes:
      backend: a ``tokenizers.Tokenizer``, with its truncation set and its padding off.
      pad: the token after the end of shorter texts.
    """

    backend: Any
    pad: int = 0

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self.backend.get_vocab_size()

    def token(self, name: str) -> int:
        """The number of a token such as '[MASK]'.

        Raises:
          KeyError: there is none of this name.
        """
        number = self.backend.token_to_id(name)
        if number is None:
            raise KeyError(f"the vocabulary has no token {name!r}")
        return number

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        length: int | None = None,
    ) -> Tokens:
        """Tokenises texts, with the special tokens of the model.

        Args:
          texts: N of them.
          pairs: N second texts.
          length: L; None = that of the longest.

        Raises:
          ValueError: a text has more than ``length`` tokens.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string; a sequence of strings is needed")
        both = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.backend.encode_batch(both)
        lengths = np.array([len(e.ids) for e in encoded], np.int32)
        longest = int(lengths.max(initial=0))
        if length is None:
            length = longest
        elif longest > length:
            raise ValueError(
                f"a text has {longest} tokens, more than length={length}. Load the tokeniser with "
                f"max_length={length} to cut texts there."
            )
        inputs = np.full((len(both), length), self.pad, np.int32)
        types = np.zeros((len(both), length), np.int32)
        for row, e in enumerate(encoded):
            inputs[row, : len(e.ids)] = e.ids
            types[row, : len(e.ids)] = e.type_ids
        return Tokens(inputs, lengths, types)

    def decode(self, tokens: Any, lengths: Any = None, *, special: bool = False) -> list[str]:
        """Texts of tokens.

        Args:
          tokens: int [N, L].
          lengths: int [N]; None = L.
          special: keep special tokens.
        """
        rows = [list(map(int, row)) for row in np.asarray(tokens)]
        if lengths is not None:
            rows = [row[:n] for row, n in zip(rows, np.asarray(lengths), strict=True)]
        return self.backend.decode_batch(rows, skip_special_tokens=not special)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "texts are tokenised with the package tokenizers, which is not installed: "
            "pip install transfer_jax[text]"
        ) from error
    return tokenizers


def load_tokenizer(
    path: str | Path, *, max_length: int | None = None, pad: int | None = None
) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Args:
      path: the file, or a model directory that has it.
      max_length: longer texts are cut so that they have so many tokens, special ones included.
      pad: see ``Tokenizer``; None = what the files name, or else 0.

    Raises:
      FileNotFoundError: there is none.
      ImportError: the package ``tokenizers`` is not installed.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}. transformers writes one beside a model with "
            "AutoTokenizer.from_pretrained(ID).save_pretrained(DIR)."
        )
    backend = _package().Tokenizer.from_file(str(file))
    if pad is None:
        pad = _pad_token(backend, file.parent / "tokenizer_config.json")
    return _finish(backend, max_length, pad)


def _pad_token(backend: Any, config: Path) -> int:
    if backend.padding is not None:
        return backend.padding["pad_id"]
    if not config.is_file():
        return 0
    name = json.loads(config.read_text()).get("pad_token")
    name = name["content"] if isinstance(name, dict) else name
    return (backend.token_to_id(name) if name else None) or 0


def _finish(backend: Any, max_length: int | None, pad: int) -> Tokenizer:
    backend.no_padding()
    if max_length is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(max_length)
    return Tokenizer(backend, pad)


BYTE_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # with the numbers of BART and RoBERTa


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    specials: Sequence[str] = (),
    template: str = "<s> $A </s>",
    max_length: int | None = None,
) -> Tokenizer:
    """Learns a byte-pair encoding of texts, on bytes as that of RoBERTa and BART.

    The first tokens are ``BYTE_SPECIALS``, then ``specials``; texts are padded with 1. The same
    texts give the same tokens.

    Args:
      texts: of the training split.
      vocab_size: V, at least 256 bytes and the special tokens.
      specials: tokens that may stand in texts, such as those of languages.
      template: what is put around a text ``$A``.
      max_length: as in ``load_tokenizer``.

    Raises:
      ImportError: the package ``tokenizers`` is not installed.
      ValueError: too small a vocabulary.
    """
    package = _package()
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    first = [*BYTE_SPECIALS, *specials]
    if vocab_size < 256 + len(first):
        raise ValueError(
            f"vocab_size={vocab_size}: bytes and special tokens alone are {256 + len(first)}."
        )
    backend = package.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, i) for i, name in enumerate(first)]
    )
    return _finish(backend, max_length, first.index("<pad>"))


# CLIP reads so many merges of its file: 49,152 tokens less 2 * 256 bytes, and one header line.
_CLIP_MERGES = 49_152 - 2 * 256 + 256 - 2


def clip_tokenizer(merges: str | Path, *, max_length: int | None = 77) -> Tokenizer:
    """CLIP's byte-pair encoding from the file of merges that OpenAI published.

    Lower case, blanks joined, '<|startoftext|>' before and '<|endoftext|>' after each text; padded
    with 0. CLIP's own program also repairs wrongly decoded texts and HTML entities first, which is
    left to the caller.

    Args:
      merges: text, or gzip where the name ends in .gz: a header, then lines 'a b'.
      max_length: as in ``load_tokenizer``.

    Raises:
      ImportError: the package ``tokenizers`` is not installed.
    """
    package = _package()
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    path = Path(merges)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = text.decode().split("\n")[1 : 1 + _CLIP_MERGES]
    pairs = [(a, b) for a, b in (line.split() for line in lines if line.strip())]
    # Printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    end = "</w>"
    start_token, end_token = "<|startoftext|>", "<|endoftext|>"
    names = [
        *symbols, *(s + end for s in symbols), *(a + b for a, b in pairs), start_token, end_token,
    ]  # fmt: skip
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = package.Tokenizer(
        models.BPE(vocabulary, pairs, end_of_word_suffix=end, unk_token=end_token)
    )
    backend.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(package.Regex(r"\s+"), " "), normalizers.Lowercase(),
    ])  # fmt: skip
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(package.Regex(words), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    last = package.Regex(f"{end}$")
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(last, ""), decoders.Replace(end, " ")]
    )
    backend.post_processor = processors.RobertaProcessing(
        (end_token, vocabulary[end_token]), (start_token, vocabulary[start_token]),
        trim_offsets=False, add_prefix_space=False,
    )  # fmt: skip
    backend.add_special_tokens([start_token, end_token])
    return _finish(backend, max_length, 0)
