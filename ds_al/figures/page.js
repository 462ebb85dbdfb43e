"use strict";
// Draws the figures, changes the theme; the zoom buttons reach timelines from the keyboard.
(function () {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const plots = Array.from(document.querySelectorAll(".plot"));

  function theme() {
    return root.dataset.theme || (system.matches ? "dark" : "light");
  }

  function name() {
    button.textContent = theme() === "dark" ? "Light colours" : "Dark colours";
  }

  function zoom(plot, how) {
    const [left, right] = plot.view, width = right - left, middle = (left + right) / 2, end = plot.end;
    const [from, to] = {
      in: [middle - width / 4, middle + width / 4],
      out: [middle - width, middle + width],
      earlier: [left - width / 2, right - width / 2],
      later: [left + width / 2, right + width / 2],
      all: [0, end],
    }[how];
    const length = Math.min(to - from, end), start = Math.min(Math.max(from, 0), end - length);
    plot.show(start, start + length);
  }

  for (const group of document.querySelectorAll(".zoom")) {
    group.addEventListener("click", (event) => {
      const how = event.target.dataset.zoom;
      if (how) zoom(document.getElementById("plot-" + group.dataset.for), how);
    });
  }

  if (location.hash === "#dark" || location.hash === "#light") root.dataset.theme = location.hash.slice(1);
  for (const plot of plots) {
    let width = plot.clientWidth;
    const data = JSON.parse(document.getElementById("data-" + plot.dataset.figure).textContent);
    const redraw = Charts.figure(plot, data);
    new ResizeObserver(() => {
      if (plot.clientWidth === width || window.matchMedia("print").matches) return;
      width = plot.clientWidth;
      redraw();
    }).observe(plot);
  }
  button.hidden = false;
  name();
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  root.dataset.drawn = String(plots.length);
})();
