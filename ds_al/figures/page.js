"use strict";
// Draws the figures, in the colours of the theme; the zoom buttons reach timelines from the keyboard.
(function () {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const palettes = {
    light: { ink: "#1b1f24", grid: "#e3e7eb", line: "#9aa3ad", paper: "#ffffff" },
    dark: { ink: "#e8eaed", grid: "#30363d", line: "#77808a", paper: "#14171b" },
  };
  const plots = Array.from(document.querySelectorAll(".plot"));
  const button = document.getElementById("theme");
  const printed = { width: 680, height: 290 }; // two figures to a page

  function theme() {
    return root.dataset.theme || (system.matches ? "dark" : "light");
  }

  function colours(palette, narrow) {
    const axis = { gridcolor: palette.grid, linecolor: palette.line, tickcolor: palette.line };
    const layout = {
      paper_bgcolor: palette.paper,
      plot_bgcolor: palette.paper,
      "font.color": palette.ink,
      "font.size": narrow ? 11 : 13,
      "hoverlabel.bgcolor": palette.paper,
      "hoverlabel.font.color": palette.ink,
      "modebar.color": palette.line,
      "modebar.activecolor": palette.ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
    };
    for (const name of ["xaxis", "yaxis"]) {
      for (const key of Object.keys(axis)) layout[name + "." + key] = axis[key];
    }
    return layout;
  }

  // Steps are drawn in the colour of the text: black on white, white on black.
  function inked(plot) {
    return plot.data.map((trace, number) => (trace.meta === "ink" ? number : -1)).filter((number) => number >= 0);
  }

  function recolour(name, width) {
    for (const plot of plots) {
      if (!plot.data) continue;
      const palette = palettes[name];
      const layout = colours(palette, plot.clientWidth < 500);
      if (width !== undefined) {
        layout.width = width || null;
        layout.autosize = !width;
        const height = Number(plot.dataset.height);
        layout.height = width ? Math.min(height, printed.height) : height;
      }
      const traces = inked(plot);
      const whiskers = plot.data.map((trace, number) => (trace.type === "bar" && trace.error_y ? number : -1));
      const barred = whiskers.filter((number) => number >= 0);
      if (barred.length) Plotly.restyle(plot, { "error_y.color": palette.ink }, barred);
      if (traces.length) {
        Plotly.update(plot, { "marker.color": palette.ink, "marker.line.color": palette.ink }, layout, traces);
      } else {
        Plotly.relayout(plot, layout);
      }
    }
    if (button) button.textContent = name === "dark" ? "Light colours" : "Dark colours";
  }

  function set(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) target = target[key] = target[key] || {};
    target[last] = value;
  }

  function draw(plot) {
    const figure = JSON.parse(document.getElementById("data-" + plot.dataset.figure).textContent);
    plot.dataset.height = figure.layout.height;
    const palette = palettes[theme()];
    const layout = colours(palette, plot.clientWidth < 500);
    for (const key of Object.keys(layout)) set(figure.layout, key, layout[key]);
    for (const trace of figure.data) {
      if (trace.type === "bar" && trace.error_y) trace.error_y.color = palette.ink;
      if (trace.meta === "ink") {
        set(trace, "marker.color", palette.ink);
        set(trace, "marker.line.color", palette.ink);
      }
    }
    return Plotly.newPlot(plot, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false,
      plotlyServerURL: "",  // nothing leaves the page
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }

  function zoom(plot, how) {
    const end = plot.layout.meta.end;
    let [left, right] = plot.layout.xaxis.range.map(Number);
    const width = right - left;
    const middle = (left + right) / 2;
    if (how === "in") [left, right] = [middle - width / 4, middle + width / 4];
    if (how === "out") [left, right] = [middle - width, middle + width];
    if (how === "earlier") [left, right] = [left - width / 2, right - width / 2];
    if (how === "later") [left, right] = [left + width / 2, right + width / 2];
    const length = how === "all" ? end : Math.min(right - left, end);
    left = how === "all" ? 0 : Math.min(Math.max(left, 0), end - length);
    Plotly.relayout(plot, { "xaxis.range": [left, left + length] });
  }

  for (const group of document.querySelectorAll(".zoom")) {
    group.addEventListener("click", (event) => {
      const how = event.target.dataset.zoom;
      if (how) zoom(document.getElementById("plot-" + group.dataset.for), how);
    });
  }

  if (location.hash === "#dark" || location.hash === "#light") root.dataset.theme = location.hash.slice(1);
  for (const plot of plots) draw(plot);
  button.hidden = false;
  button.textContent = theme() === "dark" ? "Light colours" : "Dark colours";
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    recolour(theme());
  });
  system.addEventListener("change", () => recolour(theme()));
  window.addEventListener("beforeprint", () => recolour("light", printed.width));
  window.addEventListener("afterprint", () => recolour(theme(), 0));
  root.dataset.drawn = String(plots.length);
})();
