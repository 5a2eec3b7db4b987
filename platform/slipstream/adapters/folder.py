"""What lies in an adapter folder: every file of an allowed name, kind and size, sorted into roles. Reads no content."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from slipstream.adapters.json_file import MAX_CONFIG_BYTES
from slipstream.adapters.peft_config import PEFT_CONFIG
from slipstream.adapters.rejection import Rule, reject, show
from slipstream.adapters.turbo_config import LORAX_CONFIG, SLIPSTREAM_CONFIG, TURBO_CONFIG

MAX_FILES = 64
MAX_ATTACHMENT_BYTES = 64 << 20  # the largest tokenizers have 33 MiB
DEFAULT_MAX_BYTES = 4 << 30

_CONFIGS = frozenset({PEFT_CONFIG, TURBO_CONFIG, LORAX_CONFIG, SLIPSTREAM_CONFIG})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"})
_CODE = frozenset({".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".bat", ".exe", ".js", ".ipynb", ".jar", ".whl"})
# Cards, curves, logs and tokenizer files: kept and shown, never run and not part of the digest.
_ATTACHMENTS = frozenset({".md", ".txt", ".json", ".jsonl", ".csv", ".png", ".jpg", ".jpeg", ".jinja", ".yaml", ".yml"})
_ATTACHMENT_NAMES = frozenset({"LICENSE", "NOTICE", "README", "tokenizer.model"})


@dataclass(frozen=True, slots=True)
class Listing:
    """The files by role, sorted by name. `config.json` is a config here even if it turns out not to be Medusa's."""

    folder: Path
    configs: tuple[str, ...]
    tensors: tuple[str, ...]
    attachments: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether a config or tensor file of that name is there."""
        return name in self.configs or name in self.tensors


def list_folder(folder: Path, max_bytes: int) -> Listing:
    """Check names, kinds and sizes of everything in `folder`. Raises `AdapterRejected`."""
    if not folder.is_dir():
        reject(Rule.EMPTY_FOLDER, "There is no such folder. Give the folder that holds adapter_config.json.")
    with os.scandir(folder) as scan:
        sizes = {}
        for entry in scan:
            sizes[entry.name] = _check_entry(entry.name, entry.stat(follow_symlinks=False))
            if len(sizes) > MAX_FILES:
                reject(Rule.ADAPTER_TOO_LARGE, f"The folder has more than {MAX_FILES} files. Keep only the adapter's.")
    if sum(sizes.values()) > max_bytes:
        message = f"The files have {sum(sizes.values())} bytes; an adapter may have {max_bytes}. Lower its rank."
        reject(Rule.ADAPTER_TOO_LARGE, message)
    names = sorted(sizes)
    configs = tuple(name for name in names if name in _CONFIGS)
    tensors = tuple(name for name in names if name.endswith(".safetensors"))
    for name in (*configs, *tensors):
        if sizes[name] == 0:
            reject(Rule.EMPTY_FILE, f"{name} is empty. Save or upload it again.", name)
    return Listing(folder, configs, tensors, tuple(n for n in names if n not in configs and n not in tensors))


def _check_entry(name: str, status: os.stat_result) -> int:
    """The size of one entry that may stay; else raise `AdapterRejected`."""
    if name.startswith("."):
        reject(Rule.HIDDEN_FILE, f"{show(name)} is a hidden file. Remove it.", show(name))
    if not is_file_name(name):
        advice = "Use letters, digits, '.', '_' and '-', and no '..'"
        reject(Rule.BAD_FILE_NAME, f"{show(name)} is not a safe file name. {advice}.", show(name))
    check_is_file(name, status.st_mode)
    _check_kind(name, status.st_size)
    return status.st_size


def is_file_name(name: str) -> bool:
    """Whether it is a safe one."""
    return ".." not in name and _NAME.fullmatch(name) is not None


def check_is_file(name: str, mode: int) -> None:
    """Raise `AdapterRejected` for folders, links and special files; `mode` is `lstat`'s."""
    if stat.S_ISDIR(mode):
        reject(Rule.NESTED_FOLDER, f"{name} is a folder. Publish one flat folder, such as one checkpoint.", name)
    if not stat.S_ISREG(mode):
        reject(Rule.SYMLINK, f"{name} is a link or a special file. Replace it by the file itself.", name)


def _check_kind(name: str, size: int) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        advice = "Save with safe_serialization=True and remove this file"
        reject(Rule.PICKLE_FILE, f"{name} is not safetensors. Only safetensors is accepted. {advice}.", name)
    if suffix in _CODE:
        reject(Rule.CODE_FILE, f"{name} is code. An adapter is weights and configuration only. Remove it.", name)
    if name.endswith(".safetensors"):
        return
    if suffix not in _ATTACHMENTS and name not in _ATTACHMENT_NAMES:
        reject(Rule.FILE_NOT_ALLOWED, f"{name} is no kind of file that an adapter needs. Remove it.", name)
    cap = MAX_CONFIG_BYTES if name in _CONFIGS else MAX_ATTACHMENT_BYTES
    if size > cap:
        reject(Rule.FILE_TOO_LARGE, f"{name} has {size} bytes; at most {cap} are accepted.", name)
