"""Takes the pictures of the pages: of a finished pipeline the chat page answering and the top of the report, of a
fine-tuning or of RL the top of its report, and a certificate.

    python -m bench.pictures runs/quickstart [--model RUN] [--out docs]
    python -m bench.pictures --finetune runs/mine [--out docs]
    python -m bench.pictures --rl runs/mine [--out docs]
    python -m bench.pictures --certificate certificate [--out docs]

Needs the test extras (Playwright) and Debian's chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

FLAGS = ("--no-sandbox", "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking")
QUESTIONS = ("What is 12 + 7 + 19 + 4?", "State the final answer to the following arithmetic problem: 4 - 9 + 3 - 7 =")
WAIT = 120_000  # milliseconds that an answer may take


def main() -> int:
    """Save chat.png and report.png of a pipeline, finetune.png or rl.png of a run, or certificate.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("road", type=Path, nargs="?", default=Path("runs/quickstart"))
    parser.add_argument("--finetune", type=Path, help="take finetune.png of the report of this run, and nothing else")
    parser.add_argument("--rl", type=Path, help="take rl.png of the report of this run, and nothing else")
    parser.add_argument("--certificate", type=Path, help="take certificate.png of this folder, and nothing else")
    parser.add_argument("--model", type=Path, help="the run to talk to; ROAD/quantize if left out")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.finetune is not None:
        take_page(options.finetune / "report.html", options.out / "finetune.png", height=860)
        return 0
    if options.rl is not None:
        take_page(options.rl / "report.html", options.out / "rl.png", height=1180)
        return 0
    if options.certificate is not None:
        take_page(options.certificate / "certificate.html", options.out / "certificate.png", height=900)
        return 0
    take_chat(options.model or options.road / "quantize", options.out / "chat.png")
    take_page(options.road / "report.html", options.out / "report.png", height=900)
    return 0


def take_page(file: Path, picture: Path, height: int) -> None:
    """The top of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1100, "height": height})
        page.set_default_timeout(WAIT)
        page.goto(file.resolve().as_uri(), timeout=WAIT)
        page.screenshot(path=picture)
        browser.close()


def take_chat(model: Path, picture: Path) -> None:
    """Serve the model on a free port, ask it two questions, and take the chat page with its answers."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "sprat", "serve", str(model), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
            page = browser.new_page(viewport={"width": 1180, "height": 760})
            page.set_default_timeout(WAIT)
            page.goto(address)
            page.get_by_text("on", exact=True).click()
            for question in QUESTIONS:
                page.get_by_label("Your question").fill(question)
                page.keyboard.press("Enter")
                page.get_by_label("Send").wait_for()
            page.screenshot(path=picture)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
