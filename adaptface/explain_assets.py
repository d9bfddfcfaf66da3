"""How a page of [`adaptface.explain_page`] looks and behaves: style sheet and script, part of the page; and colours."""

import json
from collections import Counter
from collections.abc import Sequence

from adaptface.explain import UNLABELLED_NAME

HEAT = (255, 92, 16)  # over a grey face, in light and dark
ALPHAS = bytes(round(230 * level / 15) for level in range(16))  # opacity of each shade of a heat map
COLOURED = 6  # names with a colour of their own; the rest is grey


def coloured(names: Sequence[str], experts: Sequence[str]) -> dict[str, int]:
    """Number of the colour of each name that gets one: of experts their place, so that all pictures agree, else the
    commonest names first.

    Args:
        names: one a dot.
        experts: names of the K experts.
    """
    counts = Counter(name for name in names if name != UNLABELLED_NAME)
    order = experts if set(counts) <= set(experts) else [name for name, _ in counts.most_common()]
    return {name: number for number, name in enumerate(order[:COLOURED]) if name in counts}


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2126; --soft: #59636e; --line: #d5dbe1; --accent: #0072b2;
  --hot: #f5a04a; --track: #e9edf1;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --other: #b4bcc4; }
@media (prefers-color-scheme: dark) { :root { --ground: #15191d; --ink: #e4e8ec; --soft: #9aa5b0; --line: #333b43;
  --accent: #4ba6dd; --hot: #a9560f; --track: #272e35; --c0: #4ba6dd; --c1: #f0803c; --c2: #2fc79a; --c3: #e39cc4;
  --c4: #f0b93a; --c5: #a5d8f5; --other: #5a646e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; } h3 { font-size: 1rem; margin: 1.2em 0 .4em; }
h1, h2, figcaption, caption, dd, li { overflow-wrap: anywhere; }
h3 small { font-weight: normal; color: var(--soft); }
section { border-top: 1px solid var(--line); padding-bottom: 1rem; }
.note { color: var(--soft); margin: .3em 0 .7em; max-width: 75ch; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: .3rem 1.5rem;
  margin: 0; }
.facts div { display: flex; gap: .6em; } dt { color: var(--soft); white-space: nowrap; } dd { margin: 0; }
.columns { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.columns > div:last-child { flex: 1 1 300px; min-width: 0; }
.face { position: relative; width: 224px; aspect-ratio: 1; background: var(--face) 0 0 / 100% 100%;
  border-radius: 4px; }
.bar { display: grid; grid-template-columns: minmax(5em, 9em) 1fr 4.5em; gap: .6em; align-items: center;
  max-width: 40em; margin: .25em 0; }
.bar > :first-child { overflow-wrap: anywhere; } .bar b { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; height: .9em; background: var(--track); border-radius: 2px; overflow: hidden; }
.track i, .track u { position: absolute; inset: 0 auto 0 0; background: var(--accent); }
.track .pale { opacity: .4; } .track u { width: 2px; margin-left: -1px; background: var(--ink); }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 0 2rem; }
.groups .bar { grid-template-columns: minmax(5em, 8em) 1fr; margin-bottom: 0; }
.numbers { margin: 0 0 .5em; color: var(--soft); font-size: .85em; }
.scroll { overflow-x: auto; }
.maps { display: grid; grid-template-columns: max-content repeat(var(--columns), minmax(42px, 96px)); gap: 4px;
  justify-content: start; align-items: center; font-size: .8rem; color: var(--soft); }
.maps > span { text-align: center; white-space: nowrap; }
.map { position: relative; aspect-ratio: 1; background: var(--grey) 0 0 / 100% 100%; overflow: hidden;
  border-radius: 2px; }
.map img, .map canvas { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.at { position: absolute; pointer-events: none; width: calc(100% / var(--side)); height: calc(100% / var(--side));
  left: calc(100% / var(--side) * var(--column)); top: calc(100% / var(--side) * var(--row));
  outline: 2px solid #fff; box-shadow: 0 0 0 4px #000; }
.cls .at { display: none; }
.chooser { width: 224px; } .chooser .face { cursor: crosshair; overflow: hidden; margin-bottom: .6rem; }
.chooser label { display: block; } .chooser input { width: 100%; accent-color: var(--accent); }
.chooser button { font: inherit; padding: .2em .9em; }
.big.maps { grid-template-columns: repeat(auto-fill, minmax(min(44%, 150px), 1fr)); justify-content: stretch;
  align-items: start; gap: .7rem; }
.big figure { margin: 0; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; font-weight: 600; }
th { font-weight: normal; color: var(--soft); padding: .1em .7em; text-align: right; }
td { padding: .15em .6em; text-align: right; border: 1px solid var(--ground);
  background: color-mix(in srgb, var(--hot) var(--depth, 0%), var(--track)); }
.scatters { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1.5rem; }
.scatters figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 4px; }
.scatters ul { display: flex; flex-wrap: wrap; gap: .1em 1.2em; list-style: none; margin: .4em 0; padding: 0; }
li::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em;
  background: var(--dot); }
circle { fill: var(--dot); fill-opacity: .8; }
.c { --dot: var(--other); } .c0 { --dot: var(--c0); } .c1 { --dot: var(--c1); } .c2 { --dot: var(--c2); }
.c3 { --dot: var(--c3); } .c4 { --dot: var(--c4); } .c5 { --dot: var(--c5); }
"""

SCRIPT = (
    f"const HEAT = {json.dumps(HEAT)}, OPAQUE = {ALPHAS[-1]};"
    + """
for (const look of document.querySelectorAll(".look")) start(look);

async function start(look) {
  const data = look.querySelector(".data");
  if (!data) return;
  const { blocks, heads, side, levels } = JSON.parse(data.dataset.shape);
  const packed = Uint8Array.from(atob(data.textContent), (c) => c.charCodeAt(0));
  const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(inflated).arrayBuffer();
  const patches = side * side, tokens = patches + 1, rows = blocks * heads * tokens;
  const peak = new Uint16Array(bytes, 0, rows);
  const onCls = new Uint16Array(bytes, 2 * rows, rows);
  const steps = new Uint8Array(bytes, 4 * rows);

  const part = look.querySelector(".patches"), face = part.querySelector(".face");
  const slider = part.querySelector("input"), shown = part.querySelector("output");
  const said = part.querySelector("[aria-live]"), maps = part.querySelector(".maps");
  const names = [...Array(heads).keys()].map((head) => `head ${head}`);
  const panels = ["mean", ...(heads > 1 ? names : [])].map((name) => {
    const figure = document.createElement("figure"), map = document.createElement("div");
    const canvas = document.createElement("canvas"), at = document.createElement("i");
    const caption = document.createElement("div");
    canvas.width = canvas.height = side;
    map.className = "map";
    at.className = "at";
    map.append(canvas, at);
    figure.append(map, caption);
    maps.append(figure);
    return { name, canvas, caption };
  });

  let token = 1 + Math.floor(side / 2) * side + Math.floor(side / 2), held = false;  // 0 is CLS

  function looked(head, into) {  // adds the attention of one head; returns what goes to CLS
    const row = (Number(slider.value) * heads + head) * tokens + token;
    const scale = peak[row] / 65535 / levels;
    for (let i = 0; i < patches; i++) into[i] += scale * steps[row * patches + i];
    return onCls[row] / 65535;
  }

  function draw() {
    shown.textContent = slider.value;
    part.classList.toggle("cls", token === 0);
    const row = Math.floor((token - 1) / side), column = (token - 1) % side;
    if (token) { part.style.setProperty("--row", row); part.style.setProperty("--column", column); }
    said.textContent = (token ? `patch in row ${row}, column ${column}` : "CLS") + (held ? ", held" : "");
    panels.forEach((panel, number) => {
      const values = new Float32Array(patches);
      let cls = 0, chosen = number ? [number - 1] : names.keys();
      let count = 0;
      for (const head of chosen) { cls += looked(head, values); count++; }
      const most = Math.max(...values) || 1;
      const context = panel.canvas.getContext("2d"), picture = context.createImageData(side, side);
      values.forEach((value, i) => picture.data.set([...HEAT, (OPAQUE * value) / most], 4 * i));
      context.putImageData(picture, 0, 0);
      panel.caption.textContent = `${panel.name}: ${((100 * cls) / count).toFixed(1)}% on CLS, ` +
        `at most ${((100 * most) / count).toFixed(1)}%`;
    });
  }

  function choose(event) {
    const box = face.getBoundingClientRect();
    const [column, row] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(
      (share) => Math.min(side - 1, Math.max(0, Math.floor(share * side))));
    token = 1 + row * side + column;
  }

  face.addEventListener("pointermove", (event) => {
    if (held || event.pointerType !== "mouse") return;
    choose(event);
    draw();
  });
  face.addEventListener("click", (event) => {
    const before = token;
    choose(event);
    held = !(held && before === token);
    draw();
  });
  face.addEventListener("keydown", (event) => {
    const move = { ArrowUp: -side, ArrowDown: side, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const column = (token - 1) % side, target = token ? token + move : 1;
    const wraps = token && Math.abs(move) === 1 && column + move !== (target - 1) % side;
    if (wraps || target < 1 || target > patches) return;
    token = target;
    held = true;
    draw();
  });
  part.querySelector("button").addEventListener("click", () => { token = 0; held = true; draw(); });
  slider.addEventListener("input", draw);
  part.hidden = false;
  draw();
}
"""
)
