"""The page in a browser: no error, and no sideways scrolling, in narrow and in wide windows."""

import html
import json
import re
import shutil
import subprocess

import pytest

from lightning_abpem.report.page import run_page
from tests.report.records import record
from tests.report.test_page import PAGES, WICKED

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (390, 1366)
# Frames of the widths, since a browser has a least width for its windows; what they measure goes into the document.
FRAME = """<!doctype html><meta charset="utf-8"><body>{frames}<pre id="seen"></pre><script>
addEventListener("load", () => {{
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, root = page.documentElement;
    const outside = [...page.querySelectorAll("main *")].filter((own) =>
      !own.closest(".wide table, svg") && own.getBoundingClientRect().right > frame.clientWidth + 1);
    const texts = [...page.querySelectorAll("svg text")].map((own) => own.getBoundingClientRect().height);
    return {{width: frame.clientWidth, scroll: root.scrollWidth, outside: outside.map((own) => own.outerHTML),
      least: Math.min(...texts), ink: getComputedStyle(page.body).color,
      text: getComputedStyle(page.querySelector("svg text")).fill, loaded: page.title}};
  }});
  document.getElementById("seen").textContent = JSON.stringify(seen);
}});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine's PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", [*PAGES, "wicked"])
def test_in_a_browser(tmp_path, kind, scheme):
    page = run_page(record(WICKED)) if kind == "wicked" else PAGES[kind]("audio")
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    (tmp_path / "frame.html").write_text(FRAME.format(frames=frames), encoding="utf-8")
    assert BROWSER is not None
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--enable-logging=stderr", "--window-size=1800,1000", "--virtual-time-budget=5000", "--dump-dom"]
    words += ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    ran = subprocess.run([*words, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120)
    [found] = re.findall(r'<pre id="seen">(.*?)</pre>', ran.stdout, flags=re.DOTALL)
    seen = json.loads(html.unescape(found))
    assert [own["width"] for own in seen] == list(WIDTHS)
    for own in seen:
        assert own["scroll"] <= own["width"]
        assert own["outside"] == []
        assert own["least"] >= 9  # px, of the smallest words in a chart
        assert own["ink"] == own["text"] == ("rgb(231, 234, 236)" if scheme == "dark" else "rgb(28, 32, 36)")
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
