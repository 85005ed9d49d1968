"""Is an export what it was, and is it that model? Files against their manifest, and against the model made again.

Against a model, the export is made a second time, in the same form, in a temporary folder, and compared byte for byte:
every weight, scale, code, key and character takes part, by the one code that writes them. Where a file differs it is
looked into, and the sentence names the tensor, the key or the character.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from sprat.errors import CheckpointError, ConfigError, SpratError, TrustError
from sprat.files import digest
from sprat.files.json import read_json
from sprat.formats import compressed_tensors, fp8, gguf, peft
from sprat.formats.export import (
    MANIFEST,
    Form,
    Format,
    manifest_path,
    tensor_digests,
    write_form,
)
from sprat.formats.gguf.export import FILE_TYPES, Kind
from sprat.formats.load import find_model, load
from sprat.trust.verify import Finding

_FORMATS: dict[str | None, Format] = {
    None: "dense",
    fp8.METHOD: "fp8",
    compressed_tensors.METHOD: "pack-quantized",
}


def verify_export(path: str | Path, *, against: str | Path | None = None) -> list[Finding]:
    """Check the export at ``path``; a ``Finding`` that is not ``ok`` is a fault, and names a file or a tensor.

    Args:
        path: a folder or GGUF file that ``export_model`` wrote, or a folder with an adapter in PEFT's layout.
        against: the model that it was made from; of an adapter, another folder with it, or the run that trained it.
            Not given, the manifest has to be there.

    Raises:
        ConfigError: there is nothing to hold the files against.
        CheckpointError: there is no such export, or no such model.
        MachineError: there is no room for the export that is made again.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError("no such export", where=str(path), todo="give a folder or a GGUF file")
    has_manifest = manifest_path(path).is_file()
    if not has_manifest and against is None:
        todo = "give the model that it was made from: --against MODEL"
        raise ConfigError("there is no manifest beside it", where=str(manifest_path(path)), todo=todo)
    findings = list(_by_manifest(path)) if has_manifest else []
    if against is not None and (path / peft.CONFIG).is_file():
        findings += _compare(path, _adapter(Path(against)))
    elif against is not None:
        try:
            form = _form_of(path)
        except SpratError as error:
            return [*findings, Finding(False, path.name, str(error))]
        with tempfile.TemporaryDirectory(prefix="sprat-verify-") as temporary:
            again = Path(temporary) / path.resolve().name
            model, tokenizer = load(find_model(against), dequantize=form.format in ("dense", "fp8"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the export has said it
                write_form(model, tokenizer, again, form, where=path)
            del model
            findings += _compare(path, again)
    return findings


def _by_manifest(path: Path) -> Iterator[Finding]:
    """The files of an export against what its manifest says of them."""
    table = read_json(manifest_path(path)) or {}
    digests, tensors = table.get("files"), table.get("tensors")
    content = {key: value for key, value in table.items() if key != "digest"}
    text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    whole = isinstance(digests, dict) and isinstance(tensors, dict)
    if not whole or manifest_path(path).read_bytes() != text.encode() or digest.of_json(content) != table.get("digest"):
        yield Finding(False, manifest_path(path).name, "the manifest is not as it was written")
        return
    assert isinstance(digests, dict) and isinstance(tensors, dict)
    files = _files(path)
    for name in sorted(digests.keys() | files.keys()):
        if name not in files:
            yield Finding(False, name, "it is missing")
        elif name not in digests:
            yield Finding(False, name, "the export did not have this file")
        elif digest.of_file(files[name]) != digests[name]:
            yield Finding(False, name, _changed_tensors(files[name], tensors))
        else:
            yield Finding(True, name, "as it was written")


def _changed_tensors(file: Path, tensors: Mapping[str, str]) -> str:
    """Which tensors of a changed ``file`` are not those of the manifest."""
    try:
        differing = [name for name, _ in sorted(tensor_digests(file).items() ^ tensors.items())]
    except SpratError as error:
        return str(error)
    is_weights = file.suffix in (".safetensors", ".gguf")
    return _say_tensors(sorted(set(differing))) if is_weights and differing else "it is not as it was written"


def _say_tensors(names: list[str]) -> str:
    more = f", as do {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]!r} differs{more}"


def _files(path: Path) -> dict[str, Path]:
    """The files of an export by name, without its manifest."""
    if path.is_file():
        return {path.name: path}
    return {name: path / name for name in digest.of_files(path) if name != MANIFEST}


def _adapter(against: Path) -> Path:
    """The folder of the adapter that ``against`` is or holds.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (against, against / "adapter", against / "artefact" / "adapter"):
        if (folder / peft.CONFIG).is_file():
            return folder
    todo = "give another folder of the adapter, or the run that trained it"
    raise CheckpointError("no adapter in this folder", where=str(against), todo=todo)


def _form_of(path: Path) -> Form:
    """The form in which ``path`` was written, from what its files say.

    Raises:
        CheckpointError: it is none of ours, or does not hold together.
    """
    if path.is_file():
        from sprat.formats.gguf.header import read_header

        keys = read_header(path).metadata
        kinds = {number: kind for kind, number in FILE_TYPES.items()}
        if (kind := kinds.get(cast(int, keys.get("general.file_type")))) is None:
            what = f"general.file_type is {keys.get('general.file_type')!r}, which no export has"
            raise CheckpointError(what, where=str(path), todo="export again")
        pre = keys.get("tokenizer.ggml.pre")
        return Form("gguf", cast(Kind, kind), pre if isinstance(pre, str) else None)
    table = read_json(path / "config.json")
    how = (table or {}).get("quantization_config")
    method = how.get("quant_method") if isinstance(how, dict) else None
    if table is None or method not in _FORMATS:
        what = "its config.json cannot be read" if table is None else f"quant_method {method!r} is none of an export"
        raise CheckpointError(what, where=str(path / "config.json"), todo="export again")
    return Form(_FORMATS[method])


def _compare(path: Path, again: Path) -> Iterator[Finding]:
    """Each file of ``path`` against that of ``again``."""
    own, made = _files(path), _files(again)
    for name in sorted(own.keys() | made.keys()):
        if name not in own:
            yield Finding(False, name, "it is missing")
        elif name not in made:
            yield Finding(False, name, "an export of this model has no such file")
        elif digest.of_file(own[name]) == digest.of_file(made[name]):
            yield Finding(True, name, "what the model gives")
        else:
            yield Finding(False, name, _explain(own[name], made[name]))


def _explain(own: Path, made: Path) -> str:
    """How a file differs from what the model gives."""
    try:
        if own.suffix == ".safetensors" or gguf.is_gguf(made):
            mine, theirs = tensor_digests(own), tensor_digests(made)
            if mine.keys() != theirs.keys():
                name = min(mine.keys() ^ theirs.keys())
                return f"tensor {name!r} is missing" if name in theirs else f"tensor {name!r} is none of the model's"
            if differing := sorted(name for name in mine if mine[name] != theirs[name]):
                return _say_tensors(differing)
            return _explain_header(own, made)
        if own.suffix == ".json":
            ours, other = read_json(own), read_json(made)
            if ours is None or other is None:
                return "it is not readable as JSON"
            if key := _differing_key(ours, other):
                return f"key {key} differs"
    except (SpratError, TrustError) as error:
        return str(error)
    mine_bytes, their_bytes = own.read_bytes(), made.read_bytes()
    at = next((n for n, (a, b) in enumerate(zip(mine_bytes, their_bytes, strict=False)) if a != b), -1)
    return f"byte {at if at >= 0 else min(len(mine_bytes), len(their_bytes))} differs"


def _explain_header(own: Path, made: Path) -> str:
    """Which key of a file differs whose tensors do not."""
    if gguf.is_gguf(own):
        from sprat.formats.gguf.header import read_header

        if key := _differing_key(read_header(own).metadata, read_header(made).metadata):
            return f"key {key} differs"
    return "its tensors are those of the model, the bytes around them are not"


def _differing_key(own: Any, made: Any, at: str = "") -> str:
    """The first key, with dots, by which two JSON values differ; empty where they do not."""
    if isinstance(own, dict) and isinstance(made, dict):
        for key in sorted(own.keys() | made.keys()):
            place = f"{at}.{key}" if at else str(key)
            if key not in own or key not in made:
                return place
            if difference := _differing_key(own[key], made[key], place):
                return difference
        return ""
    return "" if type(own) is type(made) and own == made else at
