"""The manifest of a snapshot, which lists the files and tensors, and the safetensors header for these tensors.

A manifest can be written in only one way: as JSON with sorted keys and no spaces, together with the SHA-256 of that
JSON. A manifest file with other bytes is refused, even if the content is equal, so every flipped bit is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, field_validator, model_validator

from agentmem.untrusted.json_text import parsed
from agentmem.untrusted.texts import shown

MANIFEST: Final = "manifest.json"
FORMAT: Final = "agentmem-snapshot"
VERSION: Final = 1
"""The format version of new snapshots, and the only one that can be read."""

MAX_MANIFEST_BYTES: Final = 8 << 20
MAX_STATE_BYTES: Final = 64 << 20
MAX_TENSORS: Final = 1 << 14
MAX_DIMS: Final = 16
MAX_KEYS: Final = 256
"""Most keys of a manifest, of its settings, and of each setting that is a dict."""

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: Final[Mapping[str, torch.dtype]] = {code: getattr(torch, name) for code, name in _NAMES.items()}
"""The torch dtype for each safetensors dtype name."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_STAMP = r"[0-9a-f]{10}-[0-9a-f]{16}"
DATA_NAME: Final = re.compile(rf"state-{_STAMP}\.json|tensors-{_STAMP}\.safetensors|manifest-{_STAMP}\.scratch")
"""Pattern of the names of new files of a save: with the seconds since 1970 and a random part, both in hexadecimal."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileSpec(_Frozen):
    """Name, size in bytes and SHA-256 of one data file; the name cannot contain a path."""

    name: Annotated[str, StringConstraints(pattern=rf"^(state-{_STAMP}\.json|tensors-{_STAMP}\.safetensors)$")]
    size: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class TensorSpec(_Frozen):
    """Dtype (by its safetensors name) and shape of one tensor."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...], Field(strict=False, max_length=MAX_DIMS)]

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {shown(dtype)} is none of {', '.join(DTYPES)}")
        return dtype

    @model_validator(mode="after")
    def _addressable(self) -> Self:
        # Dimensions of 0 count as 1: the strides of an empty tensor must fit into 63 bits, too.
        if math.prod(max(1, dim) for dim in self.shape) * self.torch_dtype.itemsize >= 1 << 63:
            raise ValueError(f"shape {shown(self.shape)} of {self.dtype} is beyond what 63 bits address")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch dtype."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's values in bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the dtype and shape of ``tensor``.

        Raises:
            ValueError: the tensor is sparse, a meta tensor, or of a dtype that safetensors does not know.

        """
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _CODES:
            raise ValueError(
                f"a {tensor.dtype} tensor ({tensor.layout}, on {tensor.device}) cannot be saved; "
                f"dense tensors of {', '.join(DTYPES)} can"
            )
        return cls(dtype=_CODES[tensor.dtype], shape=tuple(tensor.shape))


TensorName = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,200}$")]
_Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Manifest(_Frozen):
    """The content of a snapshot: its files, tensors and settings, and the identity of the model it belongs to."""

    format: Literal["agentmem-snapshot"] = FORMAT
    version: Literal[1] = VERSION
    agentmem: _Label
    """The version of agentmem that wrote the snapshot."""
    identity: Annotated[dict[_Label, _Label], Field(max_length=16)]
    """Fingerprints of the parts that the snapshot depends on, by the names of these parts, such as ``tokenizer``."""
    settings: dict[str, JsonValue] = {}
    state_file: FileSpec
    tensor_file: FileSpec
    tensors: Annotated[dict[TensorName, TensorSpec], Field(max_length=MAX_TENSORS)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "__metadata__" in self.tensors:
            raise ValueError("no tensor can have the name __metadata__, which safetensors reserves")
        if not self.state_file.name.startswith("state-") or not self.tensor_file.name.startswith("tensors-"):
            raise ValueError("state and tensors are mixed up in its file names")
        needed = len(header(self.tensors)) + self.tensor_bytes
        if self.tensor_file.size != needed:
            raise ValueError(
                f"{self.tensor_file.name} has {self.tensor_file.size} bytes; the tensors need exactly {needed}"
            )
        return self

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors together in bytes."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def file_names(self) -> frozenset[str]:
        """Names of the two data files."""
        return frozenset({self.state_file.name, self.tensor_file.name})

    def to_bytes(self) -> bytes:
        """Return the content of the manifest file, including the checksum."""
        body = spelled(self.model_dump(mode="json"))
        return b'{"manifest":%b,"sha256":"%b"}\n' % (body, hashlib.sha256(body).hexdigest().encode())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read a manifest from the content of its file.

        Raises:
            ValueError: ``raw`` is not exactly the content that :meth:`to_bytes` writes for a valid manifest.

        """
        body = parsed(raw, MAX_MANIFEST_BYTES).get("manifest")
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"it is no manifest of a snapshot; its format would be {FORMAT!r}")
        if body.get("version") != VERSION:
            raise ValueError(
                f"format version {shown(body.get('version'))} is unknown; this agentmem reads version {VERSION}. "
                "Load it with the agentmem that wrote it, or with a newer one"
            )
        for name, most in (("tensors", MAX_TENSORS), ("settings", MAX_KEYS)):
            _check_count(name, body.get(name), most)
        settings = body.get("settings")
        for name, value in {"manifest": body, **(settings if isinstance(settings, dict) else {})}.items():
            _check_count(name, value, MAX_KEYS)
        manifest = cls.model_validate(body)
        if manifest.to_bytes() != raw:
            raise ValueError("its content does not match its checksum")
        return manifest


def _check_count(name: str, found: object, most: int) -> None:
    """Refuse a dict with more than ``most`` keys.

    This comes before the validation of the content, which would report every key as an error.
    """
    if isinstance(found, dict) and len(found) > most:
        raise ValueError(f"{name[:80]} has {len(found)} keys; the limit is {most}")


def in_file_order(tensors: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """Return the tensors in the order in which the file holds them.

    Tensors of dtypes with more bytes come first, so that every tensor is aligned in the file. Tensors of equally large
    dtypes are sorted by name.
    """
    return sorted(tensors.items(), key=lambda item: (-item[1].torch_dtype.itemsize, item[0]))


def header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """Return the only safetensors header that is valid for these tensors.

    The header is the length of the JSON text (8 bytes, little-endian), then this text, padded to a multiple of 8 bytes.
    """
    entries, start = {}, 0
    for name, spec in in_file_order(tensors):
        stop = start + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def spelled(value: object, *, sort_keys: bool = True) -> bytes:
    """Return ``value`` as ASCII JSON without spaces.

    Raises:
        ValueError, TypeError, RecursionError: JSON cannot represent some part of ``value``.

    """
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False).encode("ascii")
