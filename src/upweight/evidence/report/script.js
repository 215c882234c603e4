// The page reads without this: it adds a crosshair with values, and legends that hide a line.
"use strict";
(() => {
  const shown = (value, percent) => {
    if (percent) return (100 * value).toFixed(1) + "\u202f%";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en-US", { maximumSignificantDigits: size >= 1000 ? 6 : 4 })
      .replace(/,/g, "\u202f");
  };

  // Index of the x nearest to `at` in a sorted list.
  const nearest = (xs, at) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < at) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - at) <= Math.abs(xs[high] - at) ? low : high;
  };

  const element = (kind, name, text) => {
    const made = document.createElement(kind);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const charts = [];
  for (const figure of document.querySelectorAll(".chart")) {
    const source = figure.querySelector('script[type="application/json"]');
    if (source) charts.push(connect(figure, JSON.parse(source.textContent)));
  }

  function connect(figure, numbers) {
    const plot = figure.querySelector(".plot");
    const hidden = new Set();
    const crosshair = plot.appendChild(element("div", "crosshair"));
    const tip = plot.appendChild(element("span", "tip"));
    crosshair.hidden = tip.hidden = true;
    const [left, right] = numbers.x;

    const point = (x) => {
      const inside = x !== null && x >= left && x <= right && right > left;
      crosshair.hidden = !inside;
      if (inside) crosshair.style.left = 100 * (x - left) / (right - left) + "%";
    };

    const describe = (x) => {
      tip.replaceChildren(element("div", "", "step " + shown(x, false)));
      numbers.lines.forEach((line, i) => {
        if (hidden.has(i) || !line.x.length) return;
        const at = nearest(line.x, x);
        if (line.y[at] === null) return;
        const row = element("div", line.tone);
        const elsewhere = line.x[at] === x ? "" : ", step " + shown(line.x[at], false);
        let text = shown(line.y[at], numbers.percent);
        const band = line.band.find((bounds) => bounds[0] === line.x[at]);
        if (band) text += ` [${shown(band[1], numbers.percent)}, ${shown(band[2], numbers.percent)}]`;
        row.append(element("i"), element("bdi", "", line.name + elsewhere), element("b", "", text));
        tip.append(row);
      });
      for (const mark of numbers.marks) {
        if (Math.abs(mark.x - x) > 0.01 * (right - left)) continue;
        const row = element("div", "warned");
        row.append(element("b", "", mark.code), element("bdi", "", mark.said));
        tip.append(row);
      }
      const share = (x - left) / (right - left);
      tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
      tip.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 10px)`;
      tip.hidden = false;
    };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = left + (right - left) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const visible = numbers.lines.filter((line, i) => !hidden.has(i) && line.x.length);
      if (!visible.length || right <= left) return;
      // The line with most points sets the steps that can be pointed at.
      const finest = visible.reduce((a, b) => (b.x.length > a.x.length ? b : a));
      const x = finest.x[nearest(finest.x, at)];
      charts.forEach((chart) => chart.point(x));
      describe(x);
    });
    plot.addEventListener("pointerleave", () => {
      charts.forEach((chart) => chart.point(null));
      tip.hidden = true;
    });

    const keys = figure.querySelectorAll(".key");
    for (const key of keys) {
      const index = Number(key.dataset.series);
      const toggle = () => {
        const off = !hidden.has(index);
        if (off) hidden.add(index); else hidden.delete(index);
        key.setAttribute("aria-pressed", String(!off));
        figure.querySelector(`g[data-series="${index}"]`).classList.toggle("off", off);
      };
      key.setAttribute("role", "button");
      key.setAttribute("aria-pressed", "true");
      key.tabIndex = 0;
      key.addEventListener("click", toggle);
      key.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle();
      });
    }
    return { point };
  }

  // A folded part cannot be read on paper.
  addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details.long")) folded.open = true;
  });
})();
