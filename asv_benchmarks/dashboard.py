"""Show what asv has measured over the commits, take a picture of it, or measure more.

    python asv_benchmarks/dashboard.py [--serve] [--measure [N]] [--picture FILE] [--offline]

The results of some commits are in the repository, in ``asv_benchmarks/results``, so that a clone
has something to show. ``--measure`` adds N commits between the first that has layers and the one
that is checked out, a few benchmarks each, under a minute a commit on an idle machine; what is
measured already is not measured again. Ctrl-C keeps the commits that are done.

The pages of asv load their scripts from content delivery networks. Where these cannot be reached,
or with ``--offline``, npm installs the same scripts beside the pages.

``--picture`` (extra ``dashboard``) looks at the pages in a headless Chromium: the one that
``playwright install chromium`` has brought, or the one of the system, or ``--browser``. It fails
if a page has an error.
"""

import argparse
import contextlib
import functools
import http.server
import json
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
HTML = HERE.parent / ".asv" / "html"
RESULTS = HERE / "results"
# The last commit without layers.
FIRST = "601c59a"
# Each layer forward and backward on large arrays, and the way to the kernels.
HISTORY = (
    r"^((forward|backward)\.(Images|Rows)\.\w+\('(\w+', 'resnet 56x56|layer', 'bert)'\)|small\.)"
)
# As in the address of its page: p- is a parameter, which may stand there several times.
BENCHMARK = "forward.Images.time_train?x-axis-scale=even&y-axis-scale=log&p-shape='resnet 56x56'"
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


def run_asv(*arguments: str, quiet: bool = False, accepted: tuple[int, ...] = (0,)) -> None:
    """Run asv here; if it fails, end with what it says, and without a traceback of our own."""
    if find_spec("asv") is None:
        raise SystemExit("asv is not installed: pip install -e '.[bench]'")
    with subprocess.Popen(
        [sys.executable, "-m", "asv", *arguments], cwd=HERE, text=True,
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
    ) as process:  # fmt: skip
        # Ctrl-C reaches both; leaving this block waits for asv, which then saves what it has.
        said = process.communicate()[0] or ""
    if process.returncode not in accepted:
        message = f"asv {arguments[0]} ended with status {process.returncode}"
        raise SystemExit(f"{said.strip()}\n{message}".strip())


def measure(commits: int, machine: str) -> None:
    """Measure some commits, evenly spread over the history."""
    print(
        f"measuring up to {commits} commits, under a minute each, and some minutes once for "
        "their environment; Ctrl-C keeps the commits that are done",
        flush=True,
    )
    listed = ["git", "-C", str(HERE), "rev-list", "--first-parent", f"{FIRST}..HEAD"]
    found = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    steps = max(commits - 1, 1)
    chosen = {found[i * (len(found) - 1) // steps]: None for i in range(commits)}
    hashes = HTML.parent / "commits"
    hashes.parent.mkdir(exist_ok=True)
    hashes.write_text("\n".join(chosen))
    # Another kernel of the operating system would begin another graph.
    run_asv("machine", "--yes", "--machine", machine, "--os", platform.system(), quiet=True)
    try:
        run_asv(
            "run", "--machine", machine, "--skip-existing-commits",
            "--attribute", "rounds=1", "--bench", HISTORY, f"HASHFILE:{hashes}",
            accepted=(0, 2),  # 2: a benchmark fails at a commit, and the others have a result
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = len(list((RESULTS / machine).glob("*-*.json")))
        raise SystemExit(
            f"interrupted: {kept} commits are kept in {RESULTS / machine}; the same command goes on"
        ) from None


def check_clone() -> None:
    """End with what to do where commits are missing."""
    git = ["git", "-C", str(HERE), "rev-parse", "--is-shallow-repository"]
    try:
        shallow = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"git is needed, which does not start: {error}") from None
    if shallow.returncode:
        raise SystemExit("the commits are needed: run it in a clone of the repository")
    if shallow.stdout.strip() == "true":
        raise SystemExit("this clone lacks older commits: git fetch --unshallow")


def publish() -> None:
    """Write the pages."""
    again = "python asv_benchmarks/dashboard.py --measure"
    if not list(RESULTS.glob("*/*-*.json")):
        raise SystemExit(f"there are no results in {RESULTS} yet: {again}")
    run_asv("publish", "--no-pull", quiet=True)
    index = json.loads((HTML / "index.json").read_text())
    if not index["graph_param_list"]:
        raise SystemExit(f"none of the commits measured is behind what is checked out: {again}")
    # A benchmark without a result would be an empty place.
    measured = {path.stem for path in (HTML / "graphs" / "summary").glob("*.json")}
    index["benchmarks"] = {k: v for k, v in index["benchmarks"].items() if k in measured}
    (HTML / "index.json").write_text(json.dumps(index))


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
    wanted = {name: (packages / "node_modules" / package.rpartition("@")[0] / file, package)
              for name in names for package, file in [SCRIPTS[name]]}  # fmt: skip
    if not all(source.exists() for source, _ in wanted.values()):
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        command += sorted({package for _, package in wanted.values()})
        try:
            subprocess.run(command, cwd=packages, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                "the pages load their scripts from the network, which cannot be reached, and npm "
                f"could not install them: {getattr(error, 'stderr', '') or error}".strip()
            ) from None
    (html / "scripts").mkdir(exist_ok=True)
    for name, (source, _) in wanted.items():
        shutil.copy(source, html / "scripts" / name)
    (html / "index.html").write_text(page)


def reachable(html: Path) -> bool:
    """Tell whether the first script of the pages can be loaded."""
    script = re.search(r'src="(https://[^"]+\.js)"', (html / "index.html").read_text())
    try:
        with urlopen(script[1] if script else "", timeout=3):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def served(html: Path, port: int = 0) -> Iterator[str]:
    """Serve the pages on this machine, at a free port unless one is given."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(html))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise SystemExit(f"port {port}: {error}; --port 0 takes a free one") from None
    with server:
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
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise SystemExit(
            "--picture: playwright is not installed: pip install -e '.[dashboard]'"
        ) from None

    pages = {
        "grid": ("", ".summary-grid, #summarygrid-display"),
        "plot": (benchmark, "#main-graph canvas"),
        "regressions": ("regressions", "#regressions-body table, #regressions-body p"),
    }
    problems: list[str] = []
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=browser or browser_of_system(),
                # A container has no sandbox, and often little shared memory; the pages are ours.
                args=["--no-sandbox", "--disable-dev-shm-usage"],
            )
            page = chromium.new_page(viewport=SIZE)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("requestfailed", lambda request: problems.append(f"not loaded: {request.url}"))
            for name, (where, selector) in pages.items():
                page.goto(f"{address}#{where}" if where else address)
                page.wait_for_selector(selector, timeout=20_000)
                page.wait_for_load_state("networkidle")
                # The plot is drawn when its data have come.
                page.wait_for_timeout(1000)
                message = page.locator("#error-message")
                if message.is_visible():
                    problems.append(f"{name}: {message.inner_text()}")
                page.screenshot(path=folder / f"{name}.png")
            chromium.close()
    except Error as error:
        hint = " (playwright install chromium, or --browser)" if "xecutable" in str(error) else ""
        problems.append(f"{str(error).splitlines()[0]}{hint}")
    if problems:
        raise SystemExit("--picture: there is none:\n" + "\n".join(sorted(set(problems))))


def main(arguments: list[str] | None = None) -> int:
    """Measure, publish, look, serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help="until Ctrl-C")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--measure", type=int, nargs="?", const=12, metavar="N", help="12 commits")
    parser.add_argument(
        "--machine", default=platform.node() or "unknown", help="the name its results go under"
    )
    parser.add_argument("--offline", action="store_true", help="install the scripts of the pages")
    parser.add_argument("--picture", type=Path, help="a PNG file of the plot of --benchmark")
    parser.add_argument("--benchmark", default=BENCHMARK, help="and its parameters, as in its URL")
    parser.add_argument("--browser", help="the path of a Chromium")
    options = parser.parse_args(arguments)
    if options.measure is not None and options.measure < 1:
        parser.error(f"--measure: at least one commit is needed, got {options.measure}")
    check_clone()
    if options.measure:
        measure(options.measure, options.machine)
    publish()
    if options.offline or ((options.serve or options.picture) and not reachable(HTML)):
        make_offline(HTML)
    if options.picture:
        names = json.loads((HTML / "index.json").read_text())["benchmarks"]
        if options.benchmark.partition("?")[0] not in names:
            parser.error(f"--benchmark: one with results is needed, of {', '.join(names)}")
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
    elif not options.picture:
        print(f"{HTML}; --serve shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
