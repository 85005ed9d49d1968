# size: one list of attacks, each a few lines
"""Ways to doctor a pipeline, and an attacker's own ledger writer: hashlib and json, nothing of the code under test."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Attack = Callable[[Path], object]


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def chained(entries: list[dict[str, Any]]) -> str:
    """The lines of ``entries`` with index, prev and hash made right from the first on."""
    lines, prev = [], "0" * 64
    for index, entry in enumerate(entries):
        new = {**{k: entry[k] for k in ("kind", "time", "body")}, "index": index, "prev": prev}
        prev = sha(canonical(new).encode())
        lines.append(canonical({**new, "hash": prev}) + "\n")
    return "".join(lines)


def entries(pipeline: Path, name: str = "ledger.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (pipeline / name).read_text().splitlines()]


def rewrite(pipeline: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]] | None]) -> None:
    """Write the whole ledger anew after ``change``, every hash recomputed."""
    found = entries(pipeline)
    (pipeline / "ledger.jsonl").write_text(chained(change(found) or found))


def append(pipeline: Path, kind: str, body: dict[str, Any]) -> None:
    """Add an entry that the chain itself cannot object to."""
    rewrite(pipeline, lambda found: [*found, {"kind": kind, "time": found[-1]["time"], "body": body}])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} holds no {old!r}"
    path.write_text(text.replace(old, new, 1))


def tree(folder: Path) -> str:
    """Digest of a folder as a run knows it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sha("".join(f"{sha((folder / name).read_bytes())}  {name}\n" for name in names).encode())


def body_of(pipeline: Path, run: str) -> dict[str, Any]:
    """What the ledger would say of ``run`` as it is now."""
    content = (pipeline / run / "run.json").read_bytes()
    known = next(e["body"] for e in entries(pipeline) if e["kind"] == "run" and e["body"]["run"] == run)
    return {**known, "record_digest": sha(content)}


def doctor(pipeline: Path, run: str = "rl-seed1") -> None:
    """Better scores, in run.json alone."""
    edit(pipeline / run / "run.json", '"mean": 0.5', '"mean": 0.9')


def second_ledger(pipeline: Path) -> None:
    """Doctored scores, with a ledger beside the true one that the run names as its own."""
    edit(pipeline / "rl-seed1" / "run.json", '"ledger_root"', '"ledger": "../ledger2.jsonl",\n "ledger_root"')
    doctor(pipeline)
    found = entries(pipeline)
    for entry in found:
        if entry["body"].get("run") == "rl-seed1":
            entry["body"] = body_of(pipeline, "rl-seed1")
    (pipeline / "ledger2.jsonl").write_text(chained(found))


def inner_ledger(pipeline: Path) -> None:
    """A run and a nearer ledger in a folder between it and the pipeline."""
    (pipeline / "deep").mkdir()
    shutil.move(pipeline / "rl-seed1", pipeline / "deep" / "rl-seed1")
    doctor(pipeline, "deep/rl-seed1")
    shutil.copy(pipeline / "ledger.jsonl", pipeline / "deep" / "ledger.jsonl")


def swap(pipeline: Path, one: str, other: str) -> None:
    for source, target in ((one, "x"), (other, one), ("x", other)):
        (pipeline / source).rename(pipeline / target)


def link(pipeline: Path, name: str) -> None:
    """The same bytes, by a link to somewhere else."""
    away = pipeline.parent / "away"
    (pipeline / name).rename(away)
    (pipeline / name).symlink_to(away)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def swap_lines(pipeline: Path, one: int, other: int) -> None:
    lines = (pipeline / "ledger.jsonl").read_text().splitlines(keepends=True)
    lines[one], lines[other] = lines[other], lines[one]
    (pipeline / "ledger.jsonl").write_text("".join(lines))


def rewrite_one(pipeline: Path) -> None:
    """Another recipe of the pipeline, its entry made to agree; what follows still names the entry's old hash."""
    edit(pipeline / "recipe.toml", "seed = 0", "seed = 7")
    found = entries(pipeline)
    one = next(entry for entry in found if entry["body"].get("path") == "recipe.toml")
    one["body"]["digest"] = sha((pipeline / "recipe.toml").read_bytes())
    one["hash"] = sha(canonical({key: item for key, item in one.items() if key != "hash"}).encode())
    (pipeline / "ledger.jsonl").write_text("".join(canonical(entry) + "\n" for entry in found))


def renumber(pipeline: Path) -> None:
    """The last line says that it is entry 99, and is chained."""
    *found, last = entries(pipeline)
    last = {**{key: item for key, item in last.items() if key != "hash"}, "index": 99}
    last["hash"] = sha(canonical(last).encode())
    (pipeline / "ledger.jsonl").write_text("".join(canonical(entry) + "\n" for entry in [*found, last]))


def aged(pipeline: Path) -> None:
    """The pipeline as it was written before ledgers had a root."""
    found = [entry for entry in entries(pipeline) if entry["kind"] in ("run", "set-aside")]
    for entry in found:
        entry["body"].pop("digest", None)
    for path in pipeline.glob("*/run.json"):
        written = json.loads(path.read_text())
        written["ledger"] = "../ledger.jsonl"
        del written["ledger_root"]
        path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
        last = [e for e in found if e["kind"] == "run" and e["body"]["run"] == path.parent.name]
        for entry in last[-1:]:
            entry["body"]["record_digest"] = sha(path.read_bytes())
    (pipeline / "ledger.jsonl").write_text(chained(found))


def drop_run(pipeline: Path, run: str) -> None:
    """Take away a run and its line, nothing recomputed."""
    shutil.rmtree(pipeline / run)
    kept = [entry for entry in entries(pipeline) if entry["body"].get("run") != run]
    (pipeline / "ledger.jsonl").write_text("".join(canonical(entry) + "\n" for entry in kept))


def collide(pipeline: Path) -> None:
    """One file whose name makes the folder's listing that of the two files before."""
    folder = pipeline / "sft" / "artefact"
    first, second = sorted(path for path in folder.iterdir() if path.is_file())
    line = f"{first.name}\n{sha(second.read_bytes())}  {second.name}"
    content = first.read_bytes()
    first.unlink()
    second.unlink()
    (folder / line.replace("/", "_")).write_bytes(content)


def duplicate_key(path: Path) -> None:
    """A key twice: the reader that takes the first sees another number than the one that takes the last."""
    edit(path, "{", '{"seed": 99,')


def replant(pipeline: Path) -> None:
    """A run of another pipeline, with that pipeline's entry for it copied into this ledger."""
    other = pipeline.parent / "other"
    shutil.move(pipeline / "rl-seed1", pipeline.parent / "gone")
    shutil.copytree(other / "rl-seed1", pipeline / "rl-seed1")
    taken = next(e for e in entries(other) if e["body"].get("run") == "rl-seed1")

    def put(found: list[dict[str, Any]]) -> None:
        for entry in found:
            if entry["body"].get("run") == "rl-seed1":
                entry["body"] = taken["body"]

    rewrite(pipeline, put)


def drop_entry(pipeline: Path, kind: str) -> None:
    rewrite(pipeline, lambda found: [entry for entry in found if entry["kind"] != kind])


def hide(pipeline: Path, where: str | None, *, rename: bool) -> None:
    """An appended set-aside entry that takes a seed out of sight."""
    digest = tree(pipeline / "rl-seed1") if rename else None
    if rename:
        (pipeline / "rl-seed1").rename(pipeline / str(where))
    else:
        shutil.rmtree(pipeline / "rl-seed1")
    append(pipeline, "set-aside", {"run": "rl-seed1", "to": where, "digest": digest})


def hide_as(pipeline: Path, more: dict[str, Any]) -> None:
    """A seed out of sight, its folder kept, under an entry that binds nothing."""
    (pipeline / "rl-seed1").rename(pipeline / "rl-seed1.old-1")
    append(pipeline, "set-aside", {"run": "rl-seed1", "to": "rl-seed1.old-1", **more})


def hide_linked(pipeline: Path) -> Path:
    """The same with a link in the folder, for which a pipeline writes an empty digest; returns the link."""
    link = pipeline / "rl-seed1" / "link"
    link.symlink_to("/etc/hostname")
    hide_as(pipeline, {"digest": ""})
    return pipeline / "rl-seed1.old-1" / "link"


def bless(pipeline: Path) -> None:
    """Doctored scores, and a second entry for the run that agrees with them."""
    doctor(pipeline)
    append(pipeline, "run", body_of(pipeline, "rl-seed1"))


def recompute(pipeline: Path) -> None:
    """Doctored scores, and the whole ledger written anew to suit them."""
    doctor(pipeline)
    new = body_of(pipeline, "rl-seed1")
    rewrite(pipeline, lambda found: [{**e, "body": new} if e["body"].get("run") == "rl-seed1" else e for e in found])


def cheapen(pipeline: Path, key: str) -> None:
    """Energy or money that does not follow from the CPU time, and the whole ledger written anew to suit it."""
    path = pipeline / "rl-seed1" / "run.json"
    written = json.loads(path.read_text())
    written[key] += 7
    path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    new = {**body_of(pipeline, "rl-seed1"), "nano_yuan": written["nano_yuan"]}
    rewrite(pipeline, lambda found: [{**e, "body": new} if e["body"].get("run") == "rl-seed1" else e for e in found])


def edited_report(pipeline: Path) -> None:
    """Another report, and an entry appended for it."""
    edit(pipeline / "report.html", "50", "90")
    append(pipeline, "files", {"path": "report.html", "digest": sha((pipeline / "report.html").read_bytes())})


def cut_tail(pipeline: Path) -> None:
    """The last run, the report after it, and their lines."""
    shutil.rmtree(pipeline / "rl-seed1")
    (pipeline / "report.html").unlink()
    whole = (pipeline / "ledger.jsonl").read_text().splitlines(keepends=True)
    place = next(n for n, e in enumerate(entries(pipeline)) if e["body"].get("run") == "rl-seed1")
    (pipeline / "ledger.jsonl").write_text("".join(whole[:place]))


def remake_aside(pipeline: Path) -> None:
    """A worse run is set aside by an honest entry, kept where the entry says, and a doctored one takes its place."""
    shutil.copytree(pipeline / "rl-seed1", pipeline / "copy")
    hide(pipeline, "rl-seed1.old-1", rename=True)
    (pipeline / "copy").rename(pipeline / "rl-seed1")
    doctor(pipeline)
    append(pipeline, "run", body_of(pipeline, "rl-seed1"))


RUN_FILES = ("run.json", "recipe.toml", "metrics.jsonl", "artefact/model.bin", "artefact/more.bin")
ROAD_FILES = ("ledger.jsonl", "recipe.toml", "report.html", "corpus/documents.jsonl", "corpus/sources.json")


def byte(name: str) -> Attack:
    def change(pipeline: Path) -> None:
        whole = bytearray((pipeline / name).read_bytes())
        whole[len(whole) // 2] ^= 1
        (pipeline / name).write_bytes(bytes(whole))

    return change


def removed(name: str) -> Attack:
    return lambda pipeline: (pipeline / name).unlink()


def added(name: str) -> Attack:
    def put(pipeline: Path) -> None:
        (pipeline / name).parent.mkdir(parents=True, exist_ok=True)
        (pipeline / name).write_text("{}")

    return put


SEEN: dict[str, Attack] = {
    **{f"a byte of {name}": byte(f"sft/{name}") for name in RUN_FILES},
    **{f"a byte of the road's {name}": byte(name) for name in ROAD_FILES},
    "a byte of a set-aside run": byte("sft.old-1/run.json"),
    **{f"no {name}": removed(f"sft/{name}") for name in RUN_FILES},
    **{f"no {name} of the road": removed(name) for name in ROAD_FILES},
    "no set-aside run": lambda pipeline: shutil.rmtree(pipeline / "sft.old-1"),
    "no corpus": lambda pipeline: shutil.rmtree(pipeline / "corpus"),
    "no input": lambda pipeline: shutil.rmtree(pipeline / "data"),
    "a file in the artefact": added("sft/artefact/extra.bin"),
    "a file in the run": added("sft/notes.txt"),
    "a folder in the run": added("sft/checkpoints/step-1"),
    "a report in the run": added("sft/report.html"),
    "a file in the corpus": added("corpus/more.jsonl"),
    "a file in the road": added("notes.txt"),
    "a hidden file in the road": added(".notes"),
    "a file in a new folder": added("more/report.html"),
    "a link taken out of a set-aside run without a digest": lambda pipeline: hide_linked(pipeline).unlink(),
    "a set-aside entry without a digest": lambda pipeline: hide_as(pipeline, {}),
    "a set-aside entry whose digest is null": lambda pipeline: hide_as(pipeline, {"digest": None}),
    "a set-aside entry whose digest is empty": lambda pipeline: hide_as(pipeline, {"digest": ""}),
    "a second set-aside folder": added("sft.old-2/run.json"),
    "a run that the ledger does not know": lambda pipeline: shutil.copytree(pipeline / "sft", pipeline / "sft2"),
    "a renamed file": lambda pipeline: (pipeline / "sft/artefact/model.bin").rename(
        pipeline / "sft/artefact/model2.bin"
    ),
    "a renamed run": lambda pipeline: (pipeline / "rl-seed1").rename(pipeline / "rl-seed2"),
    "a file name that forges the listing": collide,
    "a file that is a link": lambda pipeline: link(pipeline, "sft/artefact/model.bin"),
    "run.json that is a link": lambda pipeline: link(pipeline, "sft/run.json"),
    "the ledger that is a link": lambda pipeline: link(pipeline, "ledger.jsonl"),
    "the report that is a link": lambda pipeline: link(pipeline, "report.html"),
    "a run that is a link": lambda pipeline: link(pipeline, "rl-seed1"),
    "a pipe in the artefact": lambda pipeline: pipe(pipeline / "sft/artefact/more"),
    "a pipe for run.json": lambda pipeline: pipe(pipeline / "rl-seed1/run.json"),
    "a pipe for the metrics": lambda pipeline: pipe(pipeline / "rl-seed1/metrics.jsonl"),
    "a pipe for the ledger": lambda pipeline: pipe(pipeline / "ledger.jsonl"),
    "a pipe for the report": lambda pipeline: pipe(pipeline / "report.html"),
    "doctored scores": doctor,
    "doctored scores, recipe and all, in a swapped run": lambda pipeline: swap(pipeline, "rl-seed0", "rl-seed1"),
    "two artefacts swapped": lambda pipeline: swap(pipeline, "rl-seed0/artefact", "rl-seed1/artefact"),
    "another ledger that the run names": second_ledger,
    "another ledger between run and road": inner_ledger,
    "a run of another road and its entry": replant,
    "the ledger of another road": lambda pipeline: shutil.copy(
        pipeline.parent / "other/ledger.jsonl", pipeline / "ledger.jsonl"
    ),
    "no ledger": lambda pipeline: (pipeline / "ledger.jsonl").unlink(),
    "an empty ledger": lambda pipeline: (pipeline / "ledger.jsonl").write_text(""),
    "a second root": lambda pipeline: append(pipeline, "road", {"format": 2, "nonce": "0" * 32}),
    "no root, all recomputed": lambda pipeline: drop_entry(pipeline, "road"),
    "no entry of files, all recomputed": lambda pipeline: drop_entry(pipeline, "files"),
    "no entry of what was set aside, all recomputed": lambda pipeline: drop_entry(pipeline, "set-aside"),
    "an entry of no known kind": lambda pipeline: append(pipeline, "blessed", {"run": "rl-seed1"}),
    "an entry without its keys": lambda pipeline: append(pipeline, "run", {"stage": "rl"}),
    "an entry that is no object": lambda pipeline: append(pipeline, "run", [1]),  # type: ignore[arg-type]
    "an entry with a path out of the road": lambda pipeline: append(pipeline, "files", {"path": "../x", "digest": "0"}),
    "an entry rewritten with its own hash, the later ones left": rewrite_one,
    "entries numbered from another number": renumber,
    "two lines swapped": lambda pipeline: swap_lines(pipeline, 1, 2),
    "a line twice": lambda pipeline: (pipeline / "ledger.jsonl").write_text(
        (pipeline / "ledger.jsonl").read_text() + (pipeline / "ledger.jsonl").read_text().splitlines(keepends=True)[-1]
    ),
    "a torn line at the end": lambda pipeline: (pipeline / "ledger.jsonl").open("a").write('{"body":'),
    "blanks in a line": lambda pipeline: edit(pipeline / "ledger.jsonl", '","index":1', '", "index":1'),
    "a key twice in the ledger": lambda pipeline: edit(pipeline / "ledger.jsonl", '{"body":', '{"kind":"x","body":'),
    "a key twice in run.json": lambda pipeline: duplicate_key(pipeline / "sft/run.json"),
    "a run deleted, its line left": lambda pipeline: shutil.rmtree(pipeline / "rl-seed1"),
    "a run and its line deleted": lambda pipeline: drop_run(pipeline, "rl-seed0"),
    "the last run and its line deleted": lambda pipeline: drop_run(pipeline, "rl-seed1"),
    "a seed hidden by an entry, its folder deleted": lambda pipeline: hide(pipeline, "rl-seed1.old-1", rename=False),
    "a seed hidden by an entry to nowhere": lambda pipeline: hide(pipeline, None, rename=False),
    "a second entry that blesses doctored scores": bless,
    "run.json of hopeless depth": lambda pipeline: (pipeline / "sft/run.json").write_text("[" * 100_000),
    "run.json with a cost that is no number": lambda pipeline: edit(
        pipeline / "sft/run.json", '"device_seconds"', '"device_seconds": 1e999, "old"'
    ),
    "energy that does not follow, all recomputed": lambda pipeline: cheapen(pipeline, "energy_joules_estimated"),
    "money that does not follow, all recomputed": lambda pipeline: cheapen(pipeline, "nano_yuan"),
    "an input out of the road": lambda pipeline: edit(
        pipeline / "sft/run.json", '"path": "data"', '"path": "../other/data"'
    ),
}  # fmt: skip

# The verdict is sound, for the pipeline could be honest, but the findings name it.
TOLD: dict[str, tuple[Attack, str]] = {
    "a seed set aside and kept": (
        lambda pipeline: hide(pipeline, "rl-seed1.old-1", rename=True),
        "set aside: rl-seed1.old-1",
    ),
    "a run set aside with a link in it": (
        hide_linked,
        "not proved: rl-seed1.old-1 (it was set aside without a digest, because it holds a link",
    ),
    "a doctored run after the true one was set aside": (remake_aside, "set aside: rl-seed1.old-1"),
    "a run that is not finished": (added("rl-seed2/open.json"), "not finished: rl-seed2"),
    "a write that was cut off": (added(".recipe.toml.tmp-12"), "not proved: .recipe.toml.tmp-12"),
}

# Nothing in the folder can show it: whoever kept the ledger's head sees it. SECURITY.md says each of these sentences.
WITNESS: dict[str, tuple[Attack, str]] = {
    "doctored scores, the ledger written anew": (recompute, "the whole ledger is written anew to suit other files"),
    "the tail of the ledger cut with its run": (cut_tail, "its last entries are cut off together with the files"),
    "an edited report with an entry of its own": (edited_report, "an entry is appended for an edited report"),
}

# Does not count: the content is the same.
SAME: dict[str, tuple[Attack, str]] = {
    "other times": (
        lambda pipeline: os.utime(pipeline / "sft/run.json", (1, 1)),
        "Times, access rights and empty folders do not count",
    ),
    "other rights": (
        lambda pipeline: (pipeline / "sft/run.json").chmod(0o600),
        "access rights and empty folders do not count",
    ),
    "an empty folder": (lambda pipeline: (pipeline / "sft/artefact/none").mkdir(), "empty folders do not count"),
}
