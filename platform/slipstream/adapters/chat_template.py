"""The chat template that an adapter folder may carry. Text only: rendering it in a sandbox is the engine's part."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from slipstream.adapters.folder import Listing
from slipstream.adapters.json_file import read_object
from slipstream.adapters.rejection import Rule, reject

MAX_TEMPLATE_BYTES = 64 << 10
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_TOKENIZER_CONFIG_BYTES = 8 << 20  # it lists every added token


def read_chat_template(listing: Listing) -> str | None:
    """`chat_template.jinja`, else the one inside `tokenizer_config.json`, else None. Raises `AdapterRejected`."""
    if _TEMPLATE in listing.attachments:
        return _read_text(listing.folder / _TEMPLATE)
    if _TOKENIZER_CONFIG not in listing.attachments:
        return None
    template = read_object(listing.folder / _TOKENIZER_CONFIG, _MAX_TOKENIZER_CONFIG_BYTES).get("chat_template")
    if isinstance(template, list):  # named templates: transformers takes "default" for a plain chat
        defaults = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = defaults[0] if defaults else None
    if not isinstance(template, str):
        return None
    return _check_text(template, _TOKENIZER_CONFIG)


def _read_text(path: Path) -> str:
    try:
        return _check_text(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError:
        _reject_encoding(path.name)


def _check_text(template: str, file: str) -> str:
    try:
        size = len(template.encode("utf-8"))
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        _reject_encoding(file)
    if size > MAX_TEMPLATE_BYTES:
        message = f"{file} has a chat template of {size} bytes; at most {MAX_TEMPLATE_BYTES} are accepted."
        reject(Rule.FILE_TOO_LARGE, message, file)
    return template


def _reject_encoding(file: str) -> NoReturn:
    reject(Rule.BAD_ENCODING, f"{file}: the chat template is not UTF-8. Save it as UTF-8 text.", file)
