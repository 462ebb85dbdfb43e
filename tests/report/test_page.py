"""The page: one file, its numbers, nothing from the network, nothing of a file that runs; and in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_al.report import content, read, write_page
from ds_al.report.read import Profile
from tests.support.folders import make_run, make_seeds

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<script>alert("x")</script>'


def page_of(folder: Path, **options: object) -> str:
    runs, profiles = read([folder])
    return write_page(content(runs, profiles=profiles, **options), folder / "report.html").read_text()  # type: ignore[arg-type]


def own_part(page: str) -> str:
    """The page without its inline scripts, which name SVG by its address and never load it."""
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def row_of(page: str, caption: str, name: str) -> list[str]:
    """Texts of the row that starts with ``name``, in the table with this caption."""
    table = page[page.index(f"<caption><span>{caption}") :]
    table = table[: table.index("</table>")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return next(row for row in rows if row and row[0] == name)


def test_an_emulated_method_has_its_accuracy_and_no_times(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_run(tmp_path, method="bp_async", time="20261124-110000")
    page = page_of(tmp_path)
    row = row_of(page, "Methods:", "bp_async")
    assert row[5] == "0.9200" and row.count("not recorded") == 2  # seconds, and samples per second
    assert "bp_async is emulated in one process" in page
    with pytest.raises(StopIteration):
        row_of(page, "Seconds of training until", "bp_async")
    assert "bp_async" in page[page.index("Validation accuracy, last exit") :]


def test_numbers_of_the_methods(tmp_path: Path) -> None:
    make_seeds(tmp_path, best_validation_accuracy=0.95, best_epoch=2, rho=1.25, flops=2.5e9)
    page = page_of(tmp_path)
    row = row_of(page, "Methods:", "streaming")
    assert row[1:5] == ["2", "3", "2", "3"]
    assert row[5:9] == ["0.9100 ± 0.0100", "0.9500 ± 0.0000", "2.0 ± 0.0", "11.0 ± 1.0"]
    assert row[9:] == ["1,001 ± 1", "300", "1.25", "2.5 G"]
    assert row_of(page, "Methods:", "bp_1f1b")[5] == "0.9400 ± 0.0173"
    # 0.85, 0.9, 0.925, 0.95; epochs of 4, 5 and 6 s: streaming sees 0.7, 0.8, 0.9, the twin 0.75, 0.85, 0.95
    assert row_of(page, "Seconds of training until", "bp_1f1b")[1:] == [
        "10.0 ± 2.0 s",
        "15.0 ± 3.0 s",
        "15.0 ± 3.0 s",
        "15.0 ± 3.0 s",
    ]
    assert row_of(page, "Seconds of training until", "streaming")[4] == "not reached"
    assert row_of(page, "Bytes sent in training", "bp_1f1b")[1] == "not recorded"
    assert "Highest mean test accuracy after the last epoch: bp_1f1b, 0.9400 ± 0.0173." in page
    assert "deepspeed run/train.py --method streaming --seed 2" in page


def test_the_page_is_one_small_file_without_network(tmp_path: Path) -> None:
    make_seeds(tmp_path, epochs=20, batches=200)
    make_run(tmp_path, seed=5, trace=3000)
    page = page_of(tmp_path)
    assert len(page.encode()) < 1e6
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not loaded
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", own_part(page))
    assert "@import" not in own_part(page) and "url(" not in own_part(page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_sample_is_small() -> None:
    files = [path for path in (ROOT / "docs/sample-report").rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 1.5e6


def test_only_the_pages_own_scripts_may_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    page = page_of(tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1].replace("&#43;", "+")


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path, method="streaming", name="vgg", cpu=EVIL, command=EVIL, git_commit=EVIL, trace=1)
    for name in ("config.json", "summary.json"):
        text = (folder / name).read_text().replace('"streaming"', json.dumps(f"s{EVIL}"))
        (folder / name).write_text(text)
    trace = folder / "trace" / "trace.csv"
    trace.write_text(trace.read_text().replace("RecvActivation", "</script><b>"))
    page = page_of(tmp_path, title=EVIL, question=EVIL)
    assert "<script>alert" not in page
    assert "</script><b>" not in page
    assert "&lt;script&gt;alert" in page


def test_no_secret_of_an_older_run_is_shown(tmp_path: Path) -> None:
    secret = "s3cret-0123456789"
    for seed in (0, 1):
        command = f"deepspeed run/train.py --set comet.api_key={secret}{seed}"
        make_run(tmp_path, seed=seed, config={"comet": {"api_key": f"{secret}{seed}"}}, command=command)
    page = page_of(tmp_path)
    assert secret not in page and "comet.api_key=***" in page


def test_old_runs_say_what_was_not_recorded(tmp_path: Path) -> None:
    old = ("versions", "layers", "cpu", "git_commit", "command", "date", "cores", "device", "idle", "bytes_sent")
    facts = dict.fromkeys((*old, "peak_activation_bytes", "parameters", "partition", "model", "data"))
    make_run(tmp_path, **facts)  # type: ignore[arg-type]
    make_run(tmp_path, method="bp_1f1b", **facts)  # type: ignore[arg-type]
    page = page_of(tmp_path)
    assert row_of(page, "Machine and versions", "processor") == ["processor", "not recorded"]
    assert "Not recorded by these runs: layers, best validation accuracy, epoch of it, parameters, rho, FLOPs." in page
    assert "Idle times were not recorded." in page
    assert "Command not recorded for 2 of 2 runs" in page
    assert "give run/train.py the flag --trace" in page


def test_an_unfinished_run_is_shown_as_such(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, finished=False)
    page = page_of(tmp_path)
    assert "unfinished, 2 of 3 epochs" in page
    assert "1 (+ 1 unfinished)" in page
    assert "Unfinished, and in no mean: vgg/20261124-100100." in page


def test_unfinished_runs_alone_make_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, finished=False)
    make_run(tmp_path, seed=1, epochs=1, finished=False)
    assert "streaming (unfinished)" in page_of(tmp_path)


def test_bubbles_stand_beside_their_formula(tmp_path: Path) -> None:
    row = {"method": "bp_1f1b", "stages": 2, "micro_batches": 4, "stage": 0, "busy": 0.75, "bubble": 0.21}
    profile = Profile(tmp_path / "profile.json", {"date": "2026-11-24"}, [{**row, "bubble_formula": 0.2}])
    page = write_page(content([], profiles=[profile]), tmp_path / "report.html").read_text()
    assert row_of(page, "profile.json, 2026-11-24", "bp_1f1b") == ["bp_1f1b", "2", "4", "0", "0.75", "0.21", "0.2"]


def test_the_command_line(tmp_path: Path) -> None:
    make_seeds(tmp_path / "runs")
    command = [sys.executable, str(ROOT / "run/report.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "runs", "--out", "out/r.html", "--markdown", "out/r.md", "--title", "T"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(r"out/r.html  \d\d\.\d kB\n", done.stdout)
    assert (tmp_path / "out/r-figures/timeline-1.png").is_file()
    done = subprocess.run([*command, "none"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: none does not exist") and done.stderr.count("\n") == 1


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_figure(tmp_path: Path, theme: str) -> None:
    make_seeds(tmp_path)
    make_run(tmp_path, seed=7, cpu="Another")
    page = page_of(tmp_path)
    address = f"{(tmp_path / 'report.html').as_uri()}#{theme}"
    dom = browse(tmp_path, "--dump-dom", address)
    figures = page.count('class="plot"')
    assert figures > 6
    drawn = re.findall(r'<div class="plot"[^>]*data-figure="([^"]+)"[^>]*><svg[^>]*class="figure".*?</svg>', dom)
    assert len(set(drawn)) == figures
    assert dom.count("<svg") > 2 * figures and "NaN" not in dom  # a swatch in every legend; no number is missing
    picture = tmp_path / f"report-{theme}.png"
    browse(tmp_path, f"--screenshot={picture}", "--window-size=1200,3000", address)
    assert picture.stat().st_size > 50_000
    if kept := os.environ.get("DS_AL_ARTEFACTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, kept)


def browse(folder: Path, *arguments: str) -> str:
    """Runs the browser without a window; returns its output, and fails on any line of its console."""
    assert BROWSER
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"),
            *(f"--user-data-dir={folder / 'browser'}", *arguments),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "source: chrome" not in line]
    assert not console, "\n".join(console)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_buttons_zoom_timelines_and_change_the_theme(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    probe = """<script>
      const plot = document.getElementById("plot-timeline-1"), seen = [];
      const look = () => seen.push(plot.view.map((value) => value.toFixed(2)).join(" "));
      look();
      for (const how of ["in", "later", "earlier", "out", "all"]) {
        document.querySelector(`.zoom [data-zoom=${how}]`).click();
        look();
      }
      document.getElementById("theme").click();
      seen.push(document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor);
      document.title = seen.join(";");
    </script></body>"""
    page = re.sub(r"<meta http-equiv[^>]*>", "", page_of(tmp_path)).replace("</body>", probe)
    (tmp_path / "report.html").write_text(page)
    dom = browse(tmp_path, "--dump-dom", f"{(tmp_path / 'report.html').as_uri()}#light")
    title = re.search(r"<title>([^<]*)</title>", dom)
    assert title
    # Two batches of two micro-batches end after 11.9 s (and 2 % of margin), the trace after 24 s.
    assert title[1] == ("0.00 12.14;3.03 9.10;6.07 12.14;3.03 9.10;0.00 12.14;0.00 24.00;dark;rgb(20, 23, 27)")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_legends_hide_series_and_pointing_shows_their_values(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    probe = """<script>
      const seen = [];
      function point(plot, where) {
        const box = plot.querySelector("svg.figure").getBoundingClientRect();
        const [x, y] = where(box);
        plot.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y }));
        const tip = plot.querySelector(".tip");
        seen.push(tip.hidden ? "nothing" : tip.textContent.replaceAll("\\n", ", "));
      }
      const bars = document.getElementById("plot-idle"), lines = document.getElementById("plot-validation");
      const rects = () => bars.querySelectorAll(".figure > rect").length;
      seen.push(rects());
      bars.querySelector(".legend button").click();
      seen.push(rects());
      const left = (mark) => { const box = mark.getBoundingClientRect(); return [box.left, box.top]; };
      point(lines, () => left(lines.querySelector(".figure path[transform]")));
      point(lines, (box) => [box.right, box.bottom]);
      document.title = seen.join(";");
    </script></body>"""
    page = re.sub(r"<meta http-equiv[^>]*>", "", page_of(tmp_path)).replace("</body>", probe)
    (tmp_path / "report.html").write_text(page)
    title = re.search(r"<title>([^<]*)</title>", browse(tmp_path, "--dump-dom", (tmp_path / "report.html").as_uri()))
    assert title
    assert title[1] == "4;2;streaming, 1: 0.7;nothing"
