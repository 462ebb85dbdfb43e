"use strict";
// Draws charts and timelines as SVG. Grid, text and paper have the colours of the style sheet, so themes need no redrawing.
const Charts = (function () {
  const DASHES = ["", "2 4", "9 4 2 4", "14 4", "2 4", "9 4 2 4"];
  const HATCHES = ["", "/", "x", ".", "\\", "-"];
  const MARKS = [
    "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0", "M-3.5,-3.5 h7 v7 h-7 z", "M0,-5 L5,0 L0,5 L-5,0 z", "M0,-5 L4.5,4 L-4.5,4 z",
    "M-1.5,-4.5 h3 v3 h3 v3 h-3 v3 h-3 v-3 h-3 v-3 h3 z", "M-4,-4 L4,4 M4,-4 L-4,4",
  ];
  const STAR = "M0,-8 L2,-2.6 7.6,-2.5 3.2,1 4.7,6.5 0,3.3 -4.7,6.5 -3.2,1 -7.6,-2.5 -2,-2.6 z";
  const RISING = "M-2,2 L2,-2 M0,8 L8,0 M6,10 L10,6", FALLING = "M-2,6 L2,10 M0,0 L8,8 M6,-2 L10,2";
  const LINES = { "/": RISING, "\\": FALLING, x: `${RISING} ${FALLING}`, "-": "M0,4 H8", "|": "M4,0 V8", ".": "M3,4 h2" };
  let patterns = 0;

  function add(parent, name, attributes, text) {
    const svg = name === "svg" || parent.namespaceURI.endsWith("svg");
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) if (value !== null) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  }

  function number(value) {
    if (value && Math.abs(value) < 1e-3) return Number(value.toPrecision(4)).toExponential();
    return value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
  }

  // A fill: lines of one colour on another; without one, of the paper and of the text.
  function fill(svg, hatch, lines, ground) {
    if (!hatch) return { fill: ground, class: ground ? null : "ink" };
    const id = `hatch-${patterns++}`;
    const tile = { id, width: 8, height: 8, patternUnits: "userSpaceOnUse" };
    const pattern = add(svg, "pattern", tile);
    add(pattern, "rect", { width: 8, height: 8, fill: ground, class: ground ? null : "paper" });
    add(pattern, "path", { d: LINES[hatch], stroke: lines, "stroke-width": hatch === "." ? 2 : 1.2, fill: "none" });
    return { fill: `url(#${id})` };
  }

  function ticks(low, high, count, whole) {
    const rough = Math.max((high - low) / count, 1e-12), power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999), whole ? 1 : 0);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function powers(low, high) {
    const factors = high / low > 1000 ? [1] : [1, 2, 5], found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const factor of factors) found.push(Number((factor * 10 ** power).toPrecision(6)));
    }
    return found.filter((value) => value >= low && value <= high);
  }

  // A figure in a <div>: redrawn by the function that comes back, at first and whenever something is switched or zoomed.
  function figure(plot, data) {
    const state = { hidden: new Set(), view: [0, data.zoom], targets: [] };
    const tip = add(plot, "div", { class: "tip", hidden: "" });
    const legend = add(plot, "div", { class: "legend" });
    const names = data.rows ? [...new Set(data.slices.map((piece) => piece[1]))].sort((a, b) => a - b).map((kind) => data.kinds[kind]) : data.series;
    const draw = data.rows ? timeline : chart;

    function redraw() {
      const old = plot.querySelector("svg.figure");
      const width = Math.max(plot.clientWidth, 280), height = data.rows ? 56 + 56 * data.rows.length : 340;
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [key, value] of Object.entries({ class: "figure", viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(key, value);
      if (old) old.replaceWith(svg);
      else plot.prepend(svg);
      state.targets = [];
      draw(svg, data, state, width, height);
      plot.view = state.view;
    }

    for (const { name, look, style, dashed, colour, hatch } of names) {
      const button = add(legend, "button", { type: "button", "aria-pressed": "true" });
      const swatch = add(button, "svg", { viewBox: "0 0 30 14", class: "swatch", "aria-hidden": "true" });
      if (data.rows) add(swatch, "rect", { x: 4, width: 22, height: 14, ...fill(swatch, hatch, colour, hatch ? null : colour) });
      else if (look === "bar") add(swatch, "rect", { x: 4, width: 22, height: 14, ...fill(swatch, HATCHES[style], "#fff", colour) });
      else line(swatch, { look, style, dashed, colour }, [[2, 7], [15, 7], [28, 7]], [1]);
      add(button, "span", {}, name);
      button.addEventListener("click", () => {
        if (!state.hidden.delete(name)) state.hidden.add(name);
        button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
        redraw();
      });
    }

    function pointed(event) {
      const box = plot.querySelector("svg.figure").getBoundingClientRect();
      const scale = plot.querySelector("svg.figure").viewBox.baseVal.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    }
    plot.addEventListener("pointermove", (event) => {
      const [x, y] = pointed(event);
      let best = null, least = data.rows ? 2 : 24;
      for (const target of state.targets) {
        const [left, right, top, bottom] = target.box;
        const away = Math.hypot(Math.max(left - x, 0, x - right), Math.max(top - y, 0, y - bottom));
        if (away <= least) [best, least] = [target, away];
      }
      tip.hidden = !best;
      if (best) {
        tip.textContent = best.text;
        tip.style.left = `${Math.min(x + 12, plot.clientWidth - tip.offsetWidth - 4)}px`;
        tip.style.top = `${y + 14}px`;
      }
    });
    plot.addEventListener("pointerleave", () => (tip.hidden = true));
    if (data.rows) {
      let from = null;
      const seconds = (x) => state.view[0] + ((x - state.frame[0]) / (state.frame[1] - state.frame[0])) * (state.view[1] - state.view[0]);
      plot.addEventListener("pointerdown", (event) => (from = event.target.closest("svg.figure") ? pointed(event)[0] : null));
      plot.addEventListener("pointerup", (event) => {
        const to = pointed(event)[0];
        if (from !== null && Math.abs(to - from) > 5) plot.show(seconds(Math.min(from, to)), seconds(Math.max(from, to)));
        from = null;
      });
      plot.addEventListener("dblclick", () => plot.show(0, data.end));
      plot.end = data.end;
      plot.show = (left, right) => {
        state.view = [Math.max(left, 0), Math.min(right, data.end)];
        redraw();
      };
    }
    redraw();
    return redraw;
  }

  function axes(svg, { left, right, top, bottom, xs, ys, x, y, xName, yName, xText, yText }) {
    for (const value of ys) {
      add(svg, "path", { class: "grid", d: `M${left},${y(value)} H${right}` });
      add(svg, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, yText(value));
    }
    for (const value of xs) {
      if (xText === number) add(svg, "path", { class: "grid", d: `M${x(value)},${top} V${bottom}` });
      add(svg, "text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, xText(value));
    }
    add(svg, "path", { class: "axis", d: `M${left},${top} V${bottom} H${right}` });
    add(svg, "text", { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, xName);
    const middle = (top + bottom) / 2;
    add(svg, "text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, yName);
  }

  // A line through points (null is a gap), with marks at those of these numbers.
  function line(svg, series, points, marked) {
    const { look, style, dashed, colour } = series, thin = look === "thin", steps = look === "steps";
    let d = "", drawing = false, height = 0;
    for (const point of points) {
      if (point) d += drawing ? (steps ? `V${point[1]}H${point[0]}` : `L${point[0]},${point[1]}`) : `M${point[0]},${point[1]}`;
      drawing = Boolean(point);
    }
    const dash = thin ? null : dashed ? "6 5" : DASHES[style];
    const stroke = { stroke: colour, "stroke-width": thin ? 1.4 : 2.2, "stroke-dasharray": dash, opacity: thin ? 0.8 : 1 };
    if (look !== "mark") add(svg, "path", { d, fill: "none", ...stroke });
    if (thin || steps) return;
    for (const index of marked) {
      const [x, y] = points[index];
      const shape = { d: look === "mark" ? STAR : MARKS[style], transform: `translate(${x},${y})`, stroke: colour, "stroke-width": 1.6 };
      add(svg, "path", { ...shape, fill: dashed ? null : colour, class: dashed ? "paper" : null });
    }
  }

  function chart(svg, data, state, width, height) {
    const shown = data.series.filter((series) => !state.hidden.has(series.name));
    const bars = shown.filter((series) => series.look === "bar"), categories = bars.length ? bars.map((s) => s.x).sort((a, b) => b.length - a.length)[0] : null;
    const values = shown.flatMap((series) => series.y.flatMap((y, i) => (y === null ? [] : [y - spread(series, i), y, y + spread(series, i)])));
    const known = data.log ? values.filter((value) => value > 0) : bars.length ? [0, ...values] : values;
    let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
    if (data.log) [low, high] = [low / 1.15, high * 1.15];
    else [low, high] = [bars.length && low >= 0 ? 0 : low - (high - low || 1) * 0.05, high + (high - low || 1) * 0.05];
    const ys = data.log ? powers(low, high) : ticks(low, high, 6, false);
    const left = 40 + 7.5 * Math.max(...ys.map((value) => number(value).length), 2), right = width - 14, top = 12, bottom = height - (data.x_label ? 48 : 28);
    const place = data.log ? Math.log : (value) => value;
    const y = (value) => bottom - ((place(value) - place(low)) / (place(high) - place(low))) * (bottom - top);
    const positions = categories ? [-0.5, categories.length - 0.5] : shown.flatMap((series) => series.x);
    const first = Math.min(...positions), last = Math.max(...positions), margin = categories ? 0 : (last - first || 1) * 0.04;
    const x = (value) => left + ((value - first + margin) / (last - first + 2 * margin)) * (right - left);
    const xs = categories ? categories.map((_, i) => i) : positions.length ? ticks(first, last, Math.min(width / 80, 10), data.whole) : [];
    axes(svg, { left, right, top, bottom, xs, ys, x, y, xName: data.x_label, yName: data.y_label, yText: number, xText: categories ? (i) => categories[i] : number });
    shown.forEach((series) => {
      const share = 0.75 / Math.max(bars.length, 1), offset = (bars.indexOf(series) - bars.length / 2) * share, bar = series.look === "bar";
      const filled = bar ? fill(svg, HATCHES[series.style], "#fff", series.colour) : null;
      const points = series.y.map((value, i) => (value === null || (data.log && value <= 0) ? null : [x(bar ? i + offset + share / 2 : series.x[i]), y(value)]));
      const present = points.map((_, i) => i).filter((i) => points[i]);
      for (const i of present) {
        const [px, py] = points[i], half = bar ? ((x(1) - x(0)) * share) / 2 : 0, text = `${series.name}\n${bar ? series.x[i] : number(series.x[i])}: ${number(series.y[i])}`;
        if (bar) add(svg, "rect", { x: px - half, y: py, width: 2 * half, height: Math.max(y(Math.max(low, 0)) - py, 0), ...filled });
        if (spread(series, i)) {
          const [a, b] = [series.y[i] - spread(series, i), series.y[i] + spread(series, i)].map((value) => y(Math.max(value, low)));
          add(svg, "path", { d: `M${px - 4},${a} h8 m-4,0 V${b} m-4,0 h8`, fill: "none", stroke: bar ? null : series.colour, class: bar ? "whisker" : null, "stroke-width": 1.4 });
        }
        state.targets.push({ box: [px - half, px + half, py, bar ? bottom : py], text });
      }
      if (!bar) line(svg, series, points, present);
    });
  }

  function spread(series, i) {
    return (series.spread && series.spread[i]) || 0;
  }

  function timeline(svg, data, state, width, height) {
    const left = 24 + 7.5 * Math.max(...data.rows.map((name) => name.length)), right = width - 14, top = 8, bottom = height - 34;
    const [from, to] = state.view, row = (bottom - top) / data.rows.length, nested = data.slices.some((piece) => piece[5]);
    state.frame = [left, right];
    const x = (value) => left + ((Math.min(Math.max(value, from), to) - from) / (to - from)) * (right - left);
    const y = (value) => top + (value + 0.5) * row;
    const xs = ticks(from, to, width / 90, false);
    axes(svg, { left, right, top, bottom, xs, ys: data.rows.map((_, i) => i), x, y, xName: "", yName: "", xText: number, yText: (i) => data.rows[i] });
    for (const value of xs.slice(-1)) add(svg, "text", { x: right, y: bottom + 32, "text-anchor": "end" }, "seconds");
    const fills = data.kinds.map(({ colour, hatch }) => fill(svg, hatch, colour, hatch ? null : colour));
    for (const [number_, kind, start, end, text, inner] of data.slices) {
      const { name, hatch } = data.kinds[kind];
      if (end < from || start > to || state.hidden.has(name)) continue;
      // With slices of layers, those lie in the lower part of a row.
      const upper = y(number_) + row * (nested ? (inner ? 0.18 : -0.42) : -0.4), tall = row * (nested ? (inner ? 0.22 : 0.56) : 0.8);
      const box = { x: x(start), y: upper, width: Math.max(x(end) - x(start), name === "step" ? 1 : 0.2), height: tall };
      add(svg, "rect", { ...box, ...fills[kind], opacity: hatch ? 0.7 : null, stroke: hatch || name === "step" ? null : "rgba(0,0,0,0.45)", "stroke-width": 0.5 });
      state.targets.push({ box: [box.x, box.x + box.width, upper, upper + tall], text: `${data.rows[number_]}: ${text}\nfrom ${number(start)} s` });
    }
  }

  return { figure };
})();
