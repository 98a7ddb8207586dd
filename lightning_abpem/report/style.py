"""The look of a report: one style sheet, light and dark, for narrow and wide windows."""

__all__ = ["CSS"]

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --muted: #667078; --grid: #dfe3e6;
  --harm: #c62f2f; --good: #0b6e4f; --s0: #0b6e4f; --s1: #d2691e; --s2: #3b5bdb; --s3: #a8327d; --s4: #8a6d00;
  --s5: #4f6d7a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --ink: #e7eaec; --muted: #9aa4ac;
  --grid: #3a4147; --harm: #ff7b72; --good: #56c596; --s0: #56c596; --s1: #ff9d5c; --s2: #8ea6ff; --s3: #ee86c3;
  --s4: #d9c04f; --s5: #9db8c4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--grid); }
h3 { font-size: .95rem; margin: 0; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
.muted, figcaption { color: var(--muted); font-size: .875rem; }
.harm { color: var(--harm); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: .7rem; margin: 1.3rem 0; }
.tile, figure { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
.tile { padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .9rem; }
figure { margin: 0; padding: .8rem .9rem; min-width: 0; display: flex; flex-direction: column; }
figure svg { margin-top: auto; }
figcaption { margin: .1rem 0 .4rem; }
svg { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto; font-family: inherit; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .4rem 0 .9rem; padding: 0; list-style: none; }
.key li { color: var(--muted); font-size: .875rem; }
.key i { display: inline-block; height: .95em; margin: 0 .5em -.1em 0; border-left: 2px solid var(--muted); }
.key .event { border-left: 2px dashed var(--harm); }
.key .reset { border-left: 2px dotted var(--muted); }
.key b { color: var(--harm); margin-right: .4em; }
.wide { overflow-x: auto; max-width: 100%; border: 1px solid var(--grid); border-radius: .6rem;
  margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .9rem; }
th, td { padding: .4rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--grid); }
thead th { border-top: 0; color: var(--muted); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { color: var(--good); font-weight: 700; }
td.best span { font-weight: 400; }
td:first-child { min-width: 6.5rem; }
code { font: .87em/1.45 ui-monospace, "Liberation Mono", Menlo, monospace; }
ul.missing li { margin: .3rem 0; max-width: 75ch; }
details summary { cursor: pointer; color: var(--muted); }
"""
