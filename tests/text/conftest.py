"""A tokenizer that a person can follow: bytes, and the words that a test asks for."""

import dataclasses

import pytest


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Ids: 0 padding, 1 BOS, 2 EOS, 3 to 258 bytes, then `words`, the longest first at each place of a text."""

    words: tuple[str, ...] = ()
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 0
    puts_bos: bool = True
    puts_eos: bool = False

    @property
    def vocab_size(self) -> int:
        return 259 + len(self.words)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            word = max((w for w in self.words if text.startswith(w)), key=len, default="")
            ids += [259 + self.words.index(word)] if word else [3 + byte for byte in text[0].encode()]
            text = text[len(word) or 1 :]
        if not add_special_tokens:
            return ids
        leading = [self.bos_id] if self.puts_bos and self.bos_id is not None else []
        trailing = [self.eos_id] if self.puts_eos and self.eos_id is not None else []
        return leading + ids + trailing

    def decode(self, ids) -> str:
        parts = [self.words[i - 259].encode() if i >= 259 else bytes([i - 3]) for i in ids if i >= 3]
        return b"".join(parts).decode()


@pytest.fixture(scope="session")
def make_tokenizer():
    return ByteTokenizer


@pytest.fixture
def tokenizer():
    return ByteTokenizer()
