"""The rules an adapter folder is checked against. The codes are stable: clients and dashboards match on them."""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn

from slipstream.errors import AdapterRejected


class Rule(StrEnum):
    """One reason to refuse a folder: the value is `AdapterRejected.code`, `doc` is its line in the README's table."""

    doc: str

    def __new__(cls, code: str, doc: str) -> Rule:
        """Make a member that is its code and carries its line of documentation."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.doc = doc
        return member

    # the folder
    EMPTY_FOLDER = "empty_folder", "There is no adapter in the folder."
    PICKLE_FILE = "pickle_file", "`.bin`, `.pt`, `.pkl` and the like can run code when opened: safetensors only."
    CODE_FILE = "code_file", "Scripts and libraries are never accepted."
    NESTED_FOLDER = "nested_folder", "An adapter is a flat folder; trainer checkpoints hold it one level down."
    SYMLINK = "symlink", "Links and special files are not followed."
    HIDDEN_FILE = "hidden_file", "A name starting with a dot."
    BAD_FILE_NAME = "bad_file_name", "A name with `..` or characters outside `A-Za-z0-9._-`."
    FILE_NOT_ALLOWED = "file_not_allowed", "A kind of file that an adapter does not need."
    EMPTY_FILE = "empty_file", "A file of zero bytes."
    FILE_TOO_LARGE = "file_too_large", "A configuration, template or card over its cap."
    ADAPTER_TOO_LARGE = "adapter_too_large", "All files together, or their number, over the cap."
    MISSING_FILE = "missing_file", "A file that the others need: a config without its tensors or the other way round."
    BAD_ARCHIVE = (
        "bad_archive",
        "A `.zip`, `.tar` or `.tar.gz` that is broken, encrypted or more than an adapter's folder.",
    )
    TWO_SPECULATORS = (
        "two_speculators",
        "Both a `turbo_config.json` and a Medusa `config.json`; one speculator a folder.",
    )
    SMOKE_TEST = "smoke_test", "The version did not answer a smoke prompt, or not with what was expected."
    # JSON
    BAD_JSON = "bad_json", "Not UTF-8, not JSON, or a key given twice."
    JSON_NOT_OBJECT = "json_not_object", "A configuration that is not a JSON object."
    BAD_ENCODING = "bad_encoding", "A chat template that is not UTF-8."
    # tensor files
    TRUNCATED_FILE = "truncated_file", "The header promises more bytes than the file holds."
    BAD_HEADER = "bad_header", "The safetensors header is malformed, or its tensors overlap or leave gaps."
    HEADER_TOO_LARGE = "header_too_large", "A safetensors header over 8 MiB."
    DUPLICATE_TENSOR = "duplicate_tensor", "The same tensor twice, in one file or in two."
    UNSUPPORTED_DTYPE = "unsupported_dtype", "A tensor that is not F32, F16 or BF16."
    EMPTY_TENSOR = "empty_tensor", "A tensor with no elements."
    NON_FINITE = "non_finite", "NaN or infinity in a tensor."
    # base model
    BASE_MISSING = "base_missing", "No file says which base model the adapter is for."
    BASE_MISMATCH = "base_mismatch", "Trained for another base model, by name or by digest."
    # PEFT config
    PEFT_TYPE = "peft_type", "`peft_type` is not LORA."
    BAD_CONFIG_VALUE = "bad_config_value", "A field is missing or has the wrong type or range."
    UNSUPPORTED_FEATURE = (
        "unsupported_feature",
        "A PEFT option that this platform does not serve; the message names it.",
    )
    BASE_CHANGING_INIT = (
        "base_changing_init",
        "PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA, saved unconverted: they change the base weights.",
    )
    UNSAFE_PATTERN = (
        "unsafe_pattern",
        "A rank, alpha or target pattern that is no valid or no cheap regular expression.",
    )
    # LoRA tensors
    NO_LORA_TENSORS = "no_lora_tensors", "`adapter_model.safetensors` holds no LoRA pair."
    ADAPTER_NAME_IN_KEY = (
        "adapter_name_in_key",
        "`.lora_A.default.weight`: a raw state dict instead of `save_pretrained`.",
    )
    WRONG_PREFIX = "wrong_prefix", "A LoRA tensor that does not start with `base_model.model.`."
    EMBEDDING_WEIGHTS = "embedding_weights", "LoRA on, or a copy of, an embedding or another base weight."
    UNKNOWN_TENSOR = "unknown_tensor", "A tensor that maps to nothing: it would be ignored silently."
    UNKNOWN_MODULE = "unknown_module", "A LoRA for a module that the base model does not have."
    NOT_TARGETED = "not_targeted", "A LoRA for a module that `target_modules` does not name: PEFT would ignore it."
    UNPAIRED_TENSOR = "unpaired_tensor", "`lora_A` without `lora_B` or the other way round."
    WRONG_SHAPE = "wrong_shape", "A shape that does not fit the base model."
    RANK_MISMATCH = "rank_mismatch", "The tensor's rank is not the config's."
    RANK_TOO_LARGE = "rank_too_large", "A rank over 512."
    DORA_MISMATCH = "dora_mismatch", "`use_dora` without magnitude vectors, or the other way round."
    # streams
    MEDUSA_LAYERS = "medusa_layers", "Medusa heads of more than one residual layer."
    MEDUSA_VERSION = (
        "medusa_version",
        "A Medusa version that the tensors contradict: 1 brings LM heads of its own, 2 shares the base's.",
    )
    TURBO_VERSION = "turbo_version", "A `format_version` of turbo_config.json that this release does not know."
    UNKNOWN_KEY = "unknown_key", "A key that the configuration does not have."
    NUM_STREAMS = "num_streams", "Not 1 to 8 streams, or not as many as the config says."
    MISSING_TENSOR = "missing_tensor", "A stream lacks one of its tensors."
    BAD_ACCEPTANCE = "bad_acceptance", "Acceptance rates outside 0 to 1, or not one per stream."


def reject(rule: Rule, message: str, file: str | None = None) -> NoReturn:
    """Raise `AdapterRejected` with the rule's code; `param` is the file's name."""
    raise AdapterRejected(message, code=rule.value, param=file)


def show(text: object) -> str:
    """A publisher's own string, quoted and cut, so that it can stand in a message or a log line."""
    quoted = repr(text)
    return quoted if len(quoted) <= 160 else quoted[:157] + "..."


def rules_table() -> str:
    """The rules as a Markdown table, for the README."""
    return "\n".join(["| code | meaning |", "|---|---|", *(f"| `{rule.value}` | {rule.doc} |" for rule in Rule)])
