"""Publish what asv has measured, and take a picture of it or serve it.

    python asv_benchmarks/dashboard.py [--serve] [--picture FILE] [--offline]

The pages of asv load their scripts from content delivery networks. With ``--offline`` npm installs
the same scripts beside the pages, which then need nothing from outside.

``--picture`` (extra ``dashboard``) looks at the pages in a headless Chromium: the one that
``playwright install chromium`` has brought, or the one of the system, or ``--browser``. It fails
if a page has an error.
"""

import argparse
import contextlib
import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HTML = HERE.parent / ".asv" / "html"
# As in the address of its page: p- is a parameter, which may stand there several times.
BENCHMARK = (
    "forward.Images.time_train?x-axis-scale=even&y-axis-scale=log&p-shape='resnet 56x56'"
    "&p-library='numbanorm'&p-library='torch'"
)
SIZE = {"width": 1280, "height": 760}
# The address that asv writes ends thus; the package of npm, and the file in it.
SCRIPTS = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}


def publish() -> None:
    """Write the pages."""
    subprocess.run([sys.executable, "-m", "asv", "publish"], cwd=HERE, check=True)


def localize(page: str) -> tuple[str, list[str]]:
    """Return a page with its scripts in the folder ``scripts``, and the names of the scripts."""
    names: list[str] = []

    def local(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in SCRIPTS:
            raise ValueError(f"asv loads {match['url']}, which dashboard.py does not know")
        names.append(name)
        return f'{match["attribute"]}="scripts/{name}"'

    # Links that are followed by hand are not loaded.
    url = r'(?P<attribute>src|href)="(?P<url>https?://[^"]*/(?P<name>[^"/]+\.(?:js|css)))"'
    page = re.sub(url, local, page)
    return re.sub(r' (?:integrity|crossorigin|referrerpolicy)="[^"]*"', "", page), names


def make_offline(html: Path) -> None:
    """Put the scripts beside the pages."""
    page, names = localize((html / "index.html").read_text())
    packages = html.parent / "npm"
    packages.mkdir(exist_ok=True)
    (packages / "package.json").write_text("{}")
    wanted = sorted({SCRIPTS[name][0] for name in names})
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("--offline: npm is needed, and is not installed")
    subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *wanted],
        cwd=packages, check=True,
    )  # fmt: skip
    (html / "scripts").mkdir(exist_ok=True)
    for name in names:
        package, file = SCRIPTS[name]
        shutil.copy(
            packages / "node_modules" / package.split("@")[0] / file, html / "scripts" / name
        )
    (html / "index.html").write_text(page)


@contextlib.contextmanager
def served(html: Path, port: int = 0) -> Iterator[str]:
    """Serve the pages on this machine, at a free port unless one is given."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def browser_of_system() -> str | None:
    """Return the path of a Chromium that is installed, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def look(address: str, benchmark: str, folder: Path, browser: str | None) -> None:
    """Take pictures of the grid, of a plot over commits and of the regressions."""
    from playwright.sync_api import sync_playwright

    pages = {
        "grid": ("", ".summary-grid, #summarygrid-display"),
        "plot": (benchmark, "#main-graph canvas"),
        "regressions": ("regressions", "#regressions-body table, #regressions-body p"),
    }
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser or browser_of_system(),
            # A container has no sandbox, and often little shared memory; the pages are ours.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        page = chromium.new_page(viewport=SIZE)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"not loaded: {request.url}"))
        for name, (where, selector) in pages.items():
            page.goto(f"{address}#{where}" if where else address)
            page.wait_for_selector(selector, timeout=20_000)
            page.wait_for_load_state("networkidle")
            # The plot is drawn when its data have come.
            page.wait_for_timeout(1000)
            page.screenshot(path=folder / f"{name}.png")
        chromium.close()
    if problems:
        raise SystemExit("the dashboard has errors:\n" + "\n".join(sorted(set(problems))))


def main(arguments: list[str] | None = None) -> int:
    """Publish, look, serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help="until Ctrl-C")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--offline", action="store_true", help="install the scripts of the pages")
    parser.add_argument("--picture", type=Path, help="a PNG file of the plot of --benchmark")
    parser.add_argument("--benchmark", default=BENCHMARK, help="and its parameters, as in its URL")
    parser.add_argument("--browser", help="the path of a Chromium")
    options = parser.parse_args(arguments)
    publish()
    if options.offline:
        make_offline(HTML)
    if options.picture:
        folder = HTML.parent / "pictures"
        folder.mkdir(exist_ok=True)
        with served(HTML) as address:
            look(address, options.benchmark, folder, options.browser)
        shutil.copy(folder / "plot.png", options.picture)
        print(f"{options.picture}; all pages: {folder}")
    if options.serve:
        with served(HTML, options.port) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
