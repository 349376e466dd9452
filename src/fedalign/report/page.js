"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
  const FONT = 12;
  const MISSING = 255;
  const OCTAVES = 5;
  const state = { point: 0, hidden: new Set() };
  const figures = new Map();
  const width = () => document.querySelector("main").clientWidth;

  // ------------------------------------------------------------------ small helpers

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const color = (label) => `var(--c${label % 8})`;
  const dashes = (label) => (label < 8 ? null : "6 3");
  const symbol = (label) => SYMBOLS[label % SYMBOLS.length];
  const shown = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const visible = (one) => one.point === state.point && !state.hidden.has(one.label);
  const fill = (select, entries) => {
    const before = select.value;
    select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
    if (entries.some(([value]) => String(value) === before)) select.value = before;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const once = (make) => {
    const kept = new WeakMap();
    return (key) => (kept.has(key) ? kept.get(key) : kept.set(key, make(key)).get(key));
  };

  // ------------------------------------------------------------------ figures as files

  const save = (blob, name) => {
    const link = element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const asCsv = ({ head, rows }) => [head, ...rows()].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  const COPIED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "font-family", "font-size", "font-weight", "text-anchor", "opacity", "visibility"];
  /* All drawings of a figure below each other, with the colours that the page gives them. */
  const asSvg = (frame) => {
    const drawings = [...frame.querySelectorAll(".drawing svg")];
    let top = 0, widest = 0;
    const parts = drawings.map((svg) => {
      const copy = svg.cloneNode(true);
      const [from, to] = [svg, copy].map((one) => [one, ...one.querySelectorAll("*")]);
      from.forEach((one, i) => {
        const style = getComputedStyle(one);
        for (const name of COPIED) to[i].setAttribute(name, style.getPropertyValue(name));
        to[i].removeAttribute("class");
      });
      for (const style of copy.querySelectorAll("style")) style.remove();
      const title = svg.closest(".panel")?.querySelector(".panel-title")?.textContent ?? "";
      const { width: wide, height: tall } = svg.getBoundingClientRect();
      const label = title ? `<text x="4" y="${top + 16}" font-family="sans-serif" font-size="13" fill="${getComputedStyle(frame).color}"></text>` : "";
      if (title) top += 22;
      copy.setAttribute("y", top);
      copy.setAttribute("width", wide);
      copy.setAttribute("height", tall);
      top += tall + 12;
      widest = Math.max(widest, wide);
      return label.replace("></text>", `>${title.replaceAll("&", "&amp;").replaceAll("<", "&lt;")}</text>`) + new XMLSerializer().serializeToString(copy);
    });
    const page = getComputedStyle(document.body).backgroundColor;
    const text = `<svg xmlns="http://www.w3.org/2000/svg" width="${widest}" height="${top}" viewBox="0 0 ${widest} ${top}"><rect width="100%" height="100%" fill="${page}"/>${parts.join("")}</svg>`;
    return { text, width: widest, height: top };
  };
  const asPng = ({ text, width: wide, height: tall }, name) => {
    const image = new Image();
    image.onload = () => {
      const canvas = element("canvas", { width: Math.ceil(2 * wide), height: Math.ceil(2 * tall) });
      const context = canvas.getContext("2d");
      context.scale(2, 2);
      context.drawImage(image, 0, 0);
      canvas.toBlob((blob) => save(blob, name), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  };

  // ------------------------------------------------------------------ figures: a drawing, a caption, a table

  /* `draw(width)` returns {nodes, caption, head, rows}, or a sentence where there is nothing to show. */
  const figure = (id, draw) => {
    const frame = by(id);
    if (!frame) return;
    const details = frame.querySelector("details");
    const downloads = frame.querySelector(".downloads");
    let latest = null;
    for (const button of downloads.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const kind = button.dataset.as;
        const name = `${id.replace("figure-", "")}.${kind}`;
        if (kind === "csv") save(new Blob([asCsv(latest)], { type: "text/csv" }), name);
        else if (kind === "svg") save(new Blob([asSvg(frame).text], { type: "image/svg+xml" }), name);
        else asPng(asSvg(frame), name);
      });
    }
    const table = () => {
      if (!details.open || !latest) return;
      const cells = (kind, values) =>
        values.map((value, i) => {
          const text = typeof value === "number" || value === null ? shown(value) : value;
          return kind === "head" ? element("th", { scope: "col" }, text) : element(i ? "td" : "th", i ? {} : { scope: "row" }, text);
        });
      details.querySelector(".scroll").replaceChildren(
        element(
          "table",
          {},
          element("thead", {}, element("tr", {}, ...cells("head", latest.head))),
          element("tbody", {}, ...latest.rows().map((row) => element("tr", {}, ...cells("row", row)))),
        ),
      );
    };
    const redraw = () => {
      const drawn = draw(frame.clientWidth);
      const empty = typeof drawn === "string";
      latest = empty ? null : drawn;
      details.hidden = downloads.hidden = empty;
      frame.querySelector(".drawing").replaceChildren(...(empty ? [element("p", { class: "empty" }, drawn)] : drawn.nodes));
      frame.querySelector("figcaption").textContent = empty ? "" : drawn.caption;
      table();
    };
    details.addEventListener("toggle", table);
    figures.set(id, redraw);
  };
  let waiting = null;
  const asked = new Set();
  const redraw = (...ids) => {
    for (const id of ids.length ? ids : figures.keys()) asked.add(id);
    waiting ??= requestAnimationFrame(() => {
      waiting = null;
      const now = [...asked];
      asked.clear();
      for (const id of now) figures.get(id)?.();
    });
  };
  const panel = (title, svg, alt) => {
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", alt);
    return element("div", { class: "panel" }, ...(title ? [element("p", { class: "panel-title" }, title)] : []), svg);
  };
  const columns = (width, count, least) => {
    const fit = Math.max(1, Math.min(count, Math.floor((width + 24) / (least + 24))));
    return Math.floor((width - 24 * (fit - 1)) / fit);
  };

  /* Lines: series of {label, points: [{x, round, mean, low, high, count}]}. */
  const lines = ({ series, width, xLabel, yLabel, xType, domain }) => {
    const marks = [];
    for (const { label, points } of series) {
      const name = color(label);
      const banded = { x: "x", y1: (d) => d.low ?? NaN, y2: (d) => d.high ?? NaN };
      marks.push(Plot.areaY(points, { ...banded, fill: name, fillOpacity: 0.16, clip: true }));
    }
    for (const { label, points } of series) {
      const name = color(label);
      marks.push(Plot.lineY(points, { x: "x", y: "mean", stroke: name, strokeWidth: 2, strokeDasharray: dashes(label) }));
      marks.push(Plot.dot(points.slice(-1), { x: "x", y: "mean", fill: name, symbol: symbol(label), r: 4.5 }));
    }
    const all = series.flatMap(({ label, points }) => points.map((point) => ({ ...point, label })));
    const title = (d) =>
      `${data.labels[d.label]}\nround ${d.round}${xLabel.startsWith("round") ? "" : `, ${shown(d.x)} MB`}\n` +
      `${shown(d.mean)}${d.low === null ? "" : ` (${shown(d.low)} to ${shown(d.high)})`}, ${d.count} ${d.count === 1 ? "seed" : "seeds"}`;
    marks.push(Plot.tip(all, Plot.pointer({ x: "x", y: "mean", title, fontSize: FONT, fill: "var(--page)", stroke: "var(--soft)" })));
    const rounds = xLabel === "round" ? d3.ticks(...d3.extent(all, (d) => d.x), Math.max(3, Math.floor(width / 75))).filter(Number.isInteger) : null;
    return Plot.plot({
      width,
      height: Math.round(Math.min(340, Math.max(220, width * 0.62))),
      marginLeft: 52,
      marginBottom: 42,
      marginTop: 22,
      style: { fontSize: `${FONT}px`, background: "none" },
      x: { type: xType ?? "linear", label: xLabel, nice: xType === "linear", tickFormat: rounds ? "d" : xType === "log" ? "~s" : undefined, ticks: rounds ?? Math.max(3, Math.floor(width / 75)) },
      y: { label: yLabel, nice: true, ticks: 5, grid: true, domain },
      marks,
    });
  };
  /* A frame for the means; intervals of few seeds are so wide that they would flatten every curve. */
  const framed = (points, unit) => {
    const [low, high] = d3.extent(points, (p) => p.mean);
    if (low === high) return [Math.min(0, 1.25 * low), Math.max(1.25 * low, 0) || 1];
    const bottom = Math.max(low - (high - low), Math.min(low, d3.min(points, (p) => p.low ?? p.mean)));
    const top = Math.min(high + (high - low), Math.max(high, d3.max(points, (p) => p.high ?? p.mean)));
    return unit === "%" ? [Math.max(0, bottom), Math.min(100, top)] : [bottom, top];
  };
  const lastValues = (series, unit) =>
    series
      .map(({ label, points }) => {
        const last = points[points.length - 1];
        const band = last.low === null ? "" : ` (${last.count < data.few ? "runs from" : "95 % interval"} ${shown(last.low)} to ${shown(last.high)})`;
        return `${data.labels[label]} ${shown(last.mean)} ${unit}${band} in round ${last.round}`;
      })
      .join("; ");
  const asPoints = (rows) => rows.map(([round, mean, low, high, count]) => ({ x: round, round, mean, low, high, count }));
  const lineFigure = (group, width, least) => {
    const panels = group.panels
      .map(({ title, series }) => ({ title, series: series.filter(visible).map((one) => ({ label: one.label, points: asPoints(one.rows) })) }))
      .filter(({ series }) => series.length);
    if (!panels.length) return "Nothing to show: no algorithm is chosen, or no round has been scored.";
    const each = columns(width, panels.length, least);
    const found = framed(panels.flatMap(({ series }) => series.flatMap(({ points }) => points)), group.unit);
    const domain = group === data.divergence ? [0, found[1]] : found; // small changes of it look like changes only if they are
    return {
      nodes: panels.map(({ title, series }) =>
        panel(
          panels.length > 1 ? title : "",
          lines({ series, width: Math.min(each, 760), xLabel: "round", yLabel: axis(group), domain }),
          `Line chart of ${group.title.toLowerCase()}, ${title.toLowerCase()}, by round. ${lastValues(series, group.unit)}.`,
        ),
      ),
      caption: `${group.title} in ${group.unit}${where()}.${["Accuracy", "Loss"].includes(group.title) ? scoredOn : ""}`,
      head: ["algorithm", "of", "round", `mean, ${group.unit}`, "low", "high", "seeds"],
      rows: () =>
        panels.flatMap(({ title, series }) =>
          series.flatMap(({ label, points }) => points.map((p) => [data.labels[label], title, p.round, p.mean, p.low, p.high, p.count])),
        ),
    };
  };
  const scoredOn = data.scored ? ` Scored on ${data.scored}.` : "";
  const axis = ({ title, unit }) => `${(width() < 600 ? title.split(" ")[0] : title).toLowerCase()}, ${unit}`;
  const where = () => (data.points.length > 1 ? `, ${data.points[state.point]}` : "");

  const longestName = (width) => (width < 420 ? 14 : 20);

  /* Heat map: value(row, column) is a number, or null where there is none. */
  const heat = ({ rows, cols, value, width, colors, xLabel, yLabel, format, marks = () => "", tallest = 26, square = false, most = longestName(width) }) => {
    const cells = [];
    for (let y = 0; y < rows.length; y++) {
      for (let x = 0; x < cols.length; x++) {
        const v = value(y, x);
        if (v !== null) cells.push({ x, y, v });
      }
    }
    const longest = Math.max(...rows.map((name) => name.length));
    const marginLeft = 18 + Math.ceil(Math.min(longest, most) * FONT * 0.58) + (yLabel ? 14 : 0);
    const longestColumn = Math.min(18, Math.max(...cols.map((name) => name.length)));
    const wide = (width - marginLeft - 12) / cols.length;
    const turned = longestColumn * FONT * 0.6 + 6 > wide && longestColumn > 3;
    const step = turned ? Math.ceil(16 / wide) : Math.ceil((longestColumn * FONT * 0.62 + 8) / wide);
    const marginBottom = (turned ? longestColumn * FONT * 0.46 : 16) + 34;
    const tall = square ? wide : Math.min(tallest, Math.max(9, wide * 1.4), Math.max(9, 900 / rows.length));
    const every = Math.ceil(14 / tall);
    const inset = wide > 7 ? 0.5 : 0;
    const title = (d) => `${rows[d.y]}\n${xLabel} ${cols[d.x]}\n${format(d.v)}`;
    const texts = wide >= 11 && tall >= 11 ? cells.filter((d) => marks(d.v)) : [];
    return Plot.plot({
      width,
      height: Math.round(rows.length * tall + 22 + marginBottom),
      marginLeft,
      marginBottom,
      marginTop: 22,
      marginRight: 12,
      style: { fontSize: `${FONT}px`, background: "none" },
      x: { type: "band", domain: d3.range(cols.length), padding: 0, label: xLabel, labelAnchor: "center", labelArrow: "none", labelOffset: marginBottom - 4, tickFormat: (i) => cut(cols[i], 18), ticks: undefined, tickRotate: turned ? -50 : 0, tickSize: 3, axis: null },
      y: { type: "band", domain: d3.range(rows.length), padding: 0, label: null, axis: null },
      color: colors,
      marks: [
        Plot.frame({ fill: "var(--missing)", stroke: null }),
        Plot.axisX(d3.range(0, cols.length, step), { tickFormat: (i) => cut(cols[i], 18), tickRotate: turned ? -50 : 0, tickSize: 3, label: xLabel, labelAnchor: "center", labelArrow: "none", labelOffset: marginBottom - 6, textAnchor: turned ? "end" : "middle" }),
        Plot.axisY(d3.range(0, rows.length, every), { tickFormat: (i) => cut(rows[i], most), tickSize: 0, label: yLabel ?? null, labelArrow: "none", labelAnchor: "top" }),
        Plot.cell(cells, { x: "x", y: "y", fill: "v", inset }),
        ...(texts.length ? [Plot.text(texts, { x: "x", y: "y", text: (d) => marks(d.v), fill: "#000", stroke: "#fff", strokeWidth: 3, fontWeight: 700 })] : []),
        Plot.tip(cells, Plot.pointer({ x: "x", y: "y", title, fontSize: FONT, fill: "var(--page)", stroke: "var(--soft)", maxRadius: 40 })),
      ],
    });
  };
  const ramp = (colors, label, tickFormat, ticks = 5) => {
    const drawn = Plot.legend({ color: { ...colors, label }, width: 260, height: 46, ticks, tickFormat, style: { fontSize: `${FONT - 1}px` } });
    drawn.setAttribute("aria-hidden", "true");
    return element("div", { class: "ramp" }, drawn);
  };
  const heatRows = (rows, cols, value) => () => rows.map((name, y) => [name, ...cols.map((_, x) => value(y, x))]);
  const extreme = (rows, cols, value) => {
    let best = null;
    rows.forEach((row, y) => cols.forEach((col, x) => {
      const v = value(y, x);
      if (v !== null && (best === null || v > best.v)) best = { row, col, v };
    }));
    return best;
  };

  // ------------------------------------------------------------------ curves

  const metric = by("metric");
  fill(metric, data.curves.map((group, i) => [i, group.title]));
  figure("figure-convergence", (width) => (data.curves.length ? lineFigure(data.curves[Number(metric.value)], width, 290) : "No round was scored."));
  metric.addEventListener("change", () => redraw("figure-convergence"));
  figure("figure-divergence", (width) => {
    if (!data.divergence) return "No run recorded it.";
    const rows = data.divergence.panels.flatMap(({ series }) => series.filter(visible).flatMap((one) => one.rows));
    if (rows.length && rows.every(([, mean]) => mean === 0)) return "Zero in every round: one client alone took part, or all routed alike.";
    return lineFigure(data.divergence, width, 290);
  });

  const quality = data.curves.find((group) => group.title === "Accuracy") ?? data.curves.find((group) => group.title === "Loss");
  const bytesPanel = by("bytes-panel");
  const bytesAxis = by("bytes-axis");
  fill(bytesPanel, (quality?.panels ?? []).map((one, i) => [i, one.title.toLowerCase()]));
  figure("figure-bytes", (width) => {
    by("bytes-controls").hidden = !quality;
    if (!quality) return "No round was scored.";
    const chosen = quality.panels[Number(bytesPanel.value)];
    const log = bytesAxis.value === "log";
    const series = chosen.series.filter(visible).map((one) => {
      const sent = new Map(data.uploads.find((up) => up.point === one.point && up.label === one.label).rows);
      const points = asPoints(one.rows).map((p) => ({ ...p, x: sent.get(p.round) }));
      return { label: one.label, points: log ? points.filter((p) => p.x > 0) : points };
    }).filter((one) => one.points.length);
    if (!series.some(({ points }) => points.some((p) => p.x > 0))) return "Nothing to show: no algorithm is chosen, or nothing has been uploaded.";
    const title = `${quality.title}, ${chosen.title.toLowerCase()}`;
    return {
      nodes: [panel("", lines({ series, width: Math.min(width, 820), xLabel: "megabytes uploaded", yLabel: axis(quality), xType: bytesAxis.value, domain: framed(series.flatMap(({ points }) => points), quality.unit) }),
        `Line chart of ${title.toLowerCase()} by megabytes uploaded. ${lastValues(series, quality.unit)}.`)],
      caption: `${title}, in ${quality.unit}, by megabytes that all clients together have uploaded${where()}.${scoredOn}`,
      head: ["algorithm", "round", "MB uploaded", `mean, ${quality.unit}`, "low", "high", "seeds"],
      rows: () => series.flatMap(({ label, points }) => points.map((p) => [data.labels[label], p.round, p.x, p.mean, p.low, p.high, p.count])),
    };
  });
  for (const select of [bytesPanel, bytesAxis]) select.addEventListener("change", () => redraw("figure-bytes"));

  // ------------------------------------------------------------------ clients

  const seed = by("seed");
  const fillSeeds = () => {
    const seeds = data.clients.filter((one) => one.point === state.point).map((one) => [one.seed, one.seed]);
    fill(seed, seeds);
    by("seed-choice").hidden = seeds.length < 2;
  };
  const scoreDots = (about, shownAlgorithms, names, width, marginLeft, tall) => {
    const dots = shownAlgorithms.flatMap(({ label, values }) => values.map((v, y) => ({ label, y, v })).filter((d) => d.v !== null));
    const every = Math.ceil(14 / tall);
    const percent = about.score === "accuracy";
    const [least, most] = d3.extent(dots, (d) => d.v);
    const room = percent ? 5 : 0.05 * Math.abs(least) || 0.05;
    const domain = least === most ? [Math.max(0, least - room), percent ? Math.min(100, least + room) : least + room] : undefined; // all alike: a point needs room
    return Plot.plot({
      width,
      height: Math.round(names.length * tall + 22 + 50),
      marginLeft, marginBottom: 50, marginTop: 22, marginRight: 16,
      style: { fontSize: `${FONT}px`, background: "none" },
      x: { label: percent ? "accuracy on the client's held-out part, %" : "loss on the client's held-out part, nats per answer token", labelAnchor: "center", labelArrow: "none", labelOffset: 42, domain, nice: true, grid: true, ticks: Math.max(3, Math.floor(width / 90)) },
      y: { type: "band", domain: d3.range(names.length), label: null, axis: null },
      marks: [
        Plot.axisY(d3.range(0, names.length, every), { tickFormat: (i) => names[i], tickSize: 0 }),
        Plot.ruleY(dots, Plot.groupY({ x1: "min", x2: "max" }, { y: "y", x: "v", stroke: "var(--line)", strokeWidth: 2 })),
        ...shownAlgorithms.map(({ label }, i) => Plot.dot(dots.filter((d) => d.label === label), { x: "v", y: "y", dy: (i - (shownAlgorithms.length - 1) / 2) * Math.min(5, tall / (shownAlgorithms.length + 1)), fill: color(label), fillOpacity: 0.9, symbol: symbol(label), r: 5 })),
        Plot.tip(dots, Plot.pointer({ x: "v", y: "y", title: (d) => `${about.names[d.y]}\n${data.labels[d.label]}\n${shown(d.v)}${percent ? " %" : " nats"}${about.tested[d.y] === null ? "" : `, n = ${about.tested[d.y]}`}`, fontSize: FONT, fill: "var(--page)", stroke: "var(--soft)" })),
      ],
    });
  };
  const exampleBars = (names, examples, width, marginLeft, tall) =>
    Plot.plot({
      width,
      height: Math.round(names.length * tall + 22 + 50),
      marginLeft, marginBottom: 50, marginTop: 22, marginRight: 16,
      style: { fontSize: `${FONT}px`, background: "none" },
      x: { label: "examples to train on", labelAnchor: "center", labelArrow: "none", labelOffset: 42, nice: true, grid: true, ticks: Math.max(3, Math.floor(width / 90)) },
      y: { type: "band", domain: d3.range(names.length), label: null, axis: null, padding: 0.25 },
      marks: [
        Plot.axisY(d3.range(0, names.length, Math.ceil(14 / tall)), { tickFormat: (i) => names[i], tickSize: 0 }),
        Plot.barX(examples.map((v, y) => ({ v, y })).filter((d) => d.v !== null), { x: "v", y: "y", fill: "var(--soft)" }),
      ],
    });
  figure("figure-clients", (width) => {
    const about = data.clients.find((one) => one.point === state.point && String(one.seed) === seed.value);
    if (!about) return "No client of these runs was scored, and what clients hold was not recorded.";
    const algorithms = about.scores.filter(({ label }) => !state.hidden.has(label));
    const held = about.examples.some((count) => count !== null);
    const counted = about.labels.length > 0;
    const parts = (held ? 1 : 0) + (algorithms.length ? 1 : 0);
    if (!parts) return "Nothing to show: no algorithm is chosen.";
    const each = columns(width, parts, 380);
    const nodes = [];
    const bracketed = each >= 380;
    const most = longestName(each);
    const named = (numbers, before) => about.names.map((name, y) => {
      const bracket = numbers[y] === null || !bracketed ? "" : ` (${before}${numbers[y]})`;
      return cut(name, most - (bracket ? 3 : 0)) + bracket;
    });
    const names = named(about.examples, "");
    const tall = Math.min(26, Math.max(11, 900 / names.length));
    const margin = (texts) => 18 + Math.ceil(Math.max(...texts.map((text) => text.length)) * FONT * 0.58);
    const count = (y, x) => about.counts[y][x];
    if (counted) {
      const largest = extreme(names, about.labels, count);
      const colors = { type: "sqrt", scheme: "viridis", domain: [0, Math.max(1, largest?.v ?? 1)] };
      const svg = heat({ rows: names, cols: about.labels, value: count, width: each, colors, xLabel: "class", format: (v) => `${v} examples`, tallest: tall, most: most + 8 });
      const box = panel("Examples of each class", svg, `Heat map of class counts: ${names.length} clients by ${about.labels.length} classes.${largest ? ` Largest: ${largest.row}, ${largest.col}, ${largest.v}.` : ""}`);
      box.append(ramp(colors, "examples (square root scale)", "~s", 4));
      nodes.push(box);
    } else if (held) {
      nodes.push(panel("Examples", exampleBars(names, about.examples, each, margin(names), tall), `Bar chart of examples to train on, of ${names.length} clients: ${d3.min(about.examples)} to ${d3.max(about.examples)}.`));
    }
    const unit = about.score === "accuracy" ? "%" : "nats";
    if (algorithms.length) {
      const worst = algorithms.map(({ label, values }) => {
        const there = values.map((v, y) => ({ v, y })).filter((d) => d.v !== null);
        const [word, found] = unit === "%" ? ["lowest", d3.least(there, (d) => d.v)] : ["highest", d3.greatest(there, (d) => d.v)];
        return found ? `${data.labels[label]}: ${word} ${about.names[found.y]} with ${shown(found.v)} ${unit}` : "";
      }).filter(Boolean).join("; ");
      const tested = named(about.tested, "n = ");
      nodes.push(panel(`${about.score === "accuracy" ? "Accuracy" : "Loss"} after the last scored round`, scoreDots(about, algorithms, tested, each, margin(tested), tall), `Dot plot of each client's ${about.score}. ${worst}.`));
    }
    const thinned = about.names.length < about.of ? ` ${about.names.length} of ${about.of} clients are shown.` : "";
    const brackets = [held && "examples that the client holds", algorithms.length && about.tested.some((n) => n !== null) && "n, held-out rows that it is scored on"].filter(Boolean).join("; ");
    const recorded = (held ? "" : "What clients hold was not recorded in these runs. ") + (bracketed && brackets ? `In brackets: ${brackets}. ` : "");
    return {
      nodes,
      caption: `${recorded}Seed ${about.seed}${where()}.${thinned}`,
      head: ["client", "examples", ...about.labels, "held-out rows", ...algorithms.map(({ label }) => `${data.labels[label]}, ${about.score}, ${unit}`)],
      rows: () => about.names.map((name, y) => [name, about.examples[y], ...about.counts[y], about.tested[y], ...algorithms.map(({ values }) => values[y])]),
    };
  });
  seed.addEventListener("change", () => redraw("figure-clients"));

  // ------------------------------------------------------------------ confusion of classes

  const confusion = by("confusion");
  const confusions = () => data.confusions.filter((one) => one.point === state.point);
  const fillConfusions = () => {
    if (!confusion) return;
    fill(confusion, confusions().map((one) => [one.label, data.labels[one.label]]));
    by("confusion-choice").hidden = confusions().length < 2;
  };
  figure("figure-confusion", (width) => {
    const about = confusions().find((one) => String(one.label) === confusion.value);
    if (!about) return "Not recorded for this setting.";
    const { names, tables } = about;
    const each = columns(width, tables.length, 300);
    const value = (counts) => (y, x) => counts[y][x];
    const colors = { type: "sqrt", scheme: "viridis", domain: [0, Math.max(1, ...tables.flatMap(({ counts }) => counts.flat()))] };
    const title = (round) => (round === 0 ? "At the start" : `After round ${round}`);
    const nodes = tables.map(({ round, counts }) => {
      const right = d3.sum(names, (_, i) => counts[i][i]);
      const of = d3.sum(counts.flat());
      const svg = heat({ rows: names, cols: names, value: value(counts), width: Math.min(each, 160 + names.length * 44), colors, xLabel: "answered", yLabel: "class", format: (v) => `${v} rows`, marks: (v) => (v && names.length <= 12 ? String(v) : "") });
      return panel(`${title(round)}: ${right} of ${of} right`, svg, `Heat map of ${names.length} classes by what was answered, ${title(round).toLowerCase()}: ${right} of ${of} test rows right.`);
    });
    const thinned = names.length < about.of ? ` The ${names.length} most frequent of ${about.of} classes are shown.` : "";
    return {
      nodes: [...nodes, ramp(colors, "test rows (square root scale)", "~s", 4)],
      caption: `${data.labels[about.label]}, seed ${about.seed}${where()}, n = ${about.examples} rows of the global test set.${thinned}`,
      head: ["when", "class", ...names.map((name) => `answered ${name}`)],
      rows: () => tables.flatMap(({ round, counts }) => names.map((name, y) => [title(round), name, ...counts[y]])),
    };
  });
  confusion?.addEventListener("change", () => redraw("figure-confusion"));

  // ------------------------------------------------------------------ experts

  const unpacked = once((run) => ({
    prob: bytes(run.prob.bytes),
    gate_weight: bytes(run.gate_weight.bytes),
    expert_weight: bytes(run.expert_weight.bytes),
    load: bytes(run.load),
    similarity: run.similarity === null ? null : bytes(run.similarity),
  }));
  const inputs = { run: by("run"), layer: by("layer"), expert: by("expert"), round: by("round"), weights: by("weights") };
  const healthRuns = () => data.health.filter((run) => run.point === state.point);
  const chosenRun = () => healthRuns().find((run) => String(run.label) === inputs.run.value) ?? null;
  const fillExperts = () => {
    if (!inputs.run) return;
    const runs = healthRuns();
    fill(inputs.run, runs.map((run) => [run.label, data.labels[run.label]]));
    by("run-choice").hidden = runs.length < 2;
    fillRun();
  };
  const fillRun = () => {
    const run = chosenRun();
    by("experts-bar").hidden = run === null;
    if (run === null) return;
    fill(inputs.layer, run.layers.map((layer, i) => [i, layer]));
    fill(inputs.expert, d3.range(run.experts).map((expert) => [expert, expert]));
    const atEnd = inputs.round.dataset.set === undefined || inputs.round.value === inputs.round.max;
    inputs.round.dataset.set = "";
    inputs.round.max = run.rounds.length - 1;
    if (atEnd) inputs.round.value = inputs.round.max;
    showRound();
  };
  const showRound = () => {
    const run = chosenRun();
    const text = `${run.rounds[Number(inputs.round.value)]} of ${run.rounds[run.rounds.length - 1]}`;
    by("round-shown").textContent = text;
    inputs.round.setAttribute("aria-valuetext", `round ${text}`);
  };
  const at = (run, name, round, layer) => {
    const table = unpacked(run)[name];
    const { clients, experts, layers } = run;
    const scale = run[name].largest[layer] / 254;
    const start = (round * layers.length + layer) * clients.length * experts;
    return (y, x) => {
      const level = table[start + y * experts + x];
      return level === MISSING ? null : level * scale;
    };
  };
  const spans = once(() => new Map());
  const span = (run, layer) => {
    const known = spans(run);
    if (!known.has(layer)) {
      let [low, high] = [254, 0];
      const size = run.clients.length * run.experts;
      const table = unpacked(run).prob;
      run.rounds.forEach((_, round) => {
        const start = (round * run.layers.length + layer) * size;
        for (let i = start; i < start + size; i++) {
          if (table[i] === MISSING) continue;
          low = Math.min(low, table[i]);
          high = Math.max(high, table[i]);
        }
      });
      const scale = run.prob.largest[layer] / 254;
      known.set(layer, low < high ? [low * scale, high * scale] : [0, high * scale || 1]);
    }
    return known.get(layer);
  };
  const expertsFigure = (id, draw) =>
    figure(id, (width) => {
      const run = chosenRun();
      if (run === null) return "Not recorded for this setting.";
      return draw(run, width, Number(inputs.round.value), Number(inputs.layer.value));
    });
  const story = (run, ...parts) => `${data.labels[run.label]}, seed ${run.seed}${where()}${parts.map((part) => `, ${part}`).join("")}.`;
  const expertNames = (run) => d3.range(run.experts).map(String);

  expertsFigure("figure-routing", (run, width, round, layer) => {
    const last = run.rounds.length - 1;
    const moments = [[0, "first"], [round, "chosen"], [last, "latest"]].filter(([which], i, all) => all.findIndex(([other]) => other === which) === i || i === 1);
    const kept = round === 0 || round === last ? [[0, round === 0 ? "first, chosen" : "first"], [last, round === last ? "latest, chosen" : "latest"]].slice(last === 0 ? 1 : 0) : moments;
    const experts = expertNames(run);
    const colors = { type: "sqrt", scheme: "viridis", domain: span(run, layer) };
    const each = columns(width, kept.length, run.experts > 16 ? width : 270);
    const nodes = kept.map(([which, name]) => {
      const value = at(run, "prob", which, layer);
      const most = extreme(run.clients, experts, value);
      const svg = heat({ rows: run.clients, cols: experts, value, width: each, colors, xLabel: "expert", format: shown });
      return panel(`Round ${run.rounds[which]} (${name})`, svg,
        `Heat map of routing probability in round ${run.rounds[which]}, layer ${run.layers[layer]}: ${run.clients.length} clients by ${run.experts} experts.${most ? ` Highest: ${most.row}, expert ${most.col}, ${shown(most.v)}.` : ""} An even router gives ${shown(1 / run.experts)}.`);
    });
    const value = at(run, "prob", round, layer);
    return {
      nodes: [...nodes, ramp(colors, "mean routing probability (square root scale)", shown, 4)],
      caption: story(run, `layer ${run.layers[layer]}`, `chosen round ${run.rounds[round]}`) + ` An even router gives ${shown(1 / run.experts)} to each expert. Colours span what this layer shows over all rounds. Grey: the client took no part in that round.`,
      head: [`client, round ${run.rounds[round]}`, ...experts.map((name) => `expert ${name}`)],
      rows: heatRows(run.clients, experts, value),
    };
  });

  expertsFigure("figure-similarity", (run, width, round, layer) => {
    const table = unpacked(run).similarity;
    if (run.clients.length < 2) return "One client alone: there is nobody to compare it with.";
    if (table === null) return "Not recorded: similarities need at most 32 clients, and an algorithm that asks for sketches or tracking.health = \"full\".";
    const expert = Number(inputs.expert.value);
    const count = run.clients.length;
    const pairs = (count * (count - 1)) / 2;
    const start = ((round * run.layers.length + layer) * run.experts + expert) * pairs;
    const value = (i, j) => {
      if (i === j) return null;
      const [a, b] = i < j ? [i, j] : [j, i];
      const level = table[start + (a * (2 * count - a - 1)) / 2 + (b - a - 1)];
      return level === MISSING ? null : level / 127 - 1;
    };
    const colors = { type: "diverging", scheme: "RdBu", domain: [-1, 1], pivot: 0 };
    const most = extreme(run.clients, run.clients, value);
    const side = Math.min(width, 150 + count * 34);
    const svg = heat({ rows: run.clients, cols: run.clients, value, width: side, colors, xLabel: "client", format: (v) => shown(Number(v.toFixed(2))), square: true });
    return {
      nodes: [
        panel("", svg, `Heat map of similarity between ${count} clients for expert ${expert} of layer ${run.layers[layer]} in round ${run.rounds[round]}.${most ? ` Most alike: ${most.row} and ${most.col}, ${shown(Number(most.v.toFixed(2)))}.` : " Nobody holds it together with another client."}`),
        ramp(colors, "cosine", (v) => shown(v)),
      ],
      caption: story(run, `layer ${run.layers[layer]}`, `expert ${expert}`, `round ${run.rounds[round]}`) + " Grey: one of the two did not hold the expert, or both are the same client.",
      head: ["client", ...run.clients],
      rows: heatRows(run.clients, run.clients, value),
    };
  });

  expertsFigure("figure-weights", (run, width, round, layer) => {
    const name = inputs.weights.value;
    const what = name === "expert_weight" ? "experts" : "router rows";
    const all = at(run, name, round, layer);
    const value = (y, x) => all(y, x) || null;
    const experts = expertNames(run);
    const colors = { type: "linear", scheme: "viridis", domain: [0, run[name].largest[layer] || 1] };
    const most = extreme(run.clients, experts, value);
    if (!most) return `No client's ${what} were averaged in round ${run.rounds[round]}, layer ${run.layers[layer]}.`;
    const svg = heat({ rows: run.clients, cols: experts, value, width: Math.min(width, 150 + run.experts * 40), colors, xLabel: "expert", format: shown });
    return {
      nodes: [
        panel("", svg, `Heat map of the plan's weights of ${what} in round ${run.rounds[round]}, layer ${run.layers[layer]}: ${run.clients.length} clients by ${run.experts} experts. Largest: ${most.row}, expert ${most.col}, ${shown(most.v)}.`),
        ramp(colors, "weight", ".2~f"),
      ],
      caption: story(run, what, `layer ${run.layers[layer]}`, `round ${run.rounds[round]}`) + ` Grey: weight zero or not there, nothing uploaded. Everybody alike would be ${shown(1 / run.clients.length)}.`,
      head: ["client", ...experts.map((one) => `expert ${one}`)],
      rows: heatRows(run.clients, experts, all),
    };
  });
  inputs.weights?.addEventListener("change", () => redraw("figure-weights"));

  figure("figure-balance", (width) => {
    const runs = healthRuns().filter((run) => !state.hidden.has(run.label));
    if (!runs.length) return "Nothing to show: no algorithm is chosen, or none recorded it.";
    const kinds = [["Dead experts", 1], ["Overloaded experts", 2]].filter(([, place]) => runs.some((run) => run.balance.some((row) => row[place] > 0)));
    if (!kinds.length) return `No expert was dead or overloaded in any round, of ${runs[0].of_layers * runs[0].experts} in ${runs[0].of_layers} layers.`;
    const never = kinds.length === 2 ? "" : kinds[0][1] === 1 ? " None was ever overloaded." : " None was ever dead.";
    const panels = kinds.map(([title, place]) => ({
      title,
      series: runs.map((run) => ({ label: run.label, points: run.balance.map((row) => ({ x: row[0], round: row[0], mean: row[place], low: null, high: null, count: 1 })) })),
    }));
    const each = columns(width, panels.length, 290);
    const cells = (run) => run.of_layers * run.experts;
    const highest = Math.max(4, ...runs.flatMap((run) => run.balance.flatMap((row) => row.slice(1))));
    return {
      nodes: panels.map(({ title, series }) => panel(title, lines({ series, width: Math.min(each, 560), xLabel: "round", yLabel: "experts", domain: [0, highest] }), `Line chart of ${title.toLowerCase()} by round. ${lastValues(series, "experts")}.`)),
      caption: `Counts over all ${runs[0].of_layers} layers, of ${cells(runs[0])} experts in all${where()}.${never}`,
      head: ["algorithm", "round", "dead", "overloaded", "of"],
      rows: () => runs.flatMap((run) => run.balance.map(([round, dead, over]) => [data.labels[run.label], round, dead, over, cells(run)])),
    };
  });

  expertsFigure("figure-load", (run, width, round) => {
    const table = unpacked(run).load;
    const value = (y, x) => {
      const level = table[(round * run.layers.length + y) * run.experts + x];
      return level === 0 ? 0 : 2 ** (((level - 1) / 254) * 2 * OCTAVES - OCTAVES);
    };
    const experts = expertNames(run);
    const layers = run.layers.map((layer) => `layer ${layer}`);
    const colors = { type: "diverging-log", scheme: "PuOr", domain: [1 / 8, 8], pivot: 1, clamp: true, reverse: true };
    const drawn = (y, x) => Math.max(value(y, x), 2 ** -OCTAVES / 2);
    const marks = (v) => (v < data.bounds.dead ? "×" : v > data.bounds.overloaded ? "+" : "");
    let dead = 0, over = 0;
    layers.forEach((_, y) => experts.forEach((__, x) => { dead += value(y, x) < data.bounds.dead; over += value(y, x) > data.bounds.overloaded; }));
    const svg = heat({ rows: layers, cols: experts, value: drawn, width: Math.min(width, 150 + run.experts * 40), colors, xLabel: "expert", format: (v) => (v < 2 ** -OCTAVES ? "no tokens" : `${shown(Number(v.toPrecision(2)))} × an even share`), marks });
    return {
      nodes: [
        panel("", svg, `Heat map of the load of each expert in round ${run.rounds[round]}: ${layers.length} layers by ${run.experts} experts; ${dead} dead, ${over} overloaded.`),
        ramp(colors, "times an even share", (v) => (v < 1 ? `1/${1 / v}` : String(v)), [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]),
      ],
      caption: story(run, `round ${run.rounds[round]}`) + ` ${dead} dead (×), ${over} overloaded (+) in the layers shown.`,
      head: ["layer", ...experts.map((one) => `expert ${one}`)],
      rows: heatRows(layers, experts, value),
    };
  });

  const ofRun = ["figure-routing", "figure-similarity", "figure-weights", "figure-load"];
  inputs.run?.addEventListener("change", () => { fillRun(); redraw(...ofRun); });
  inputs.layer?.addEventListener("change", () => redraw(...ofRun));
  inputs.expert?.addEventListener("change", () => redraw("figure-similarity"));
  inputs.round?.addEventListener("input", () => { showRound(); redraw(...ofRun); });

  // ------------------------------------------------------------------ what all figures share

  const swatch = (label) => {
    const svg = d3.create("svg").attr("width", 26).attr("height", 14).attr("viewBox", "0 0 26 14").attr("aria-hidden", "true");
    svg.append("line").attr("x1", 0).attr("x2", 26).attr("y1", 7).attr("y2", 7).attr("stroke", color(label)).attr("stroke-width", 2).attr("stroke-dasharray", dashes(label));
    const kind = { circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond: d3.symbolDiamond, star: d3.symbolStar, wye: d3.symbolWye, cross: d3.symbolCross }[symbol(label)];
    svg.append("path").attr("d", d3.symbol(kind, 60)()).attr("transform", "translate(13,7)").attr("fill", color(label));
    return svg.node();
  };
  data.labels.forEach((name, label) => {
    const box = element("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(label);
      else state.hidden.add(label);
      redraw("figure-convergence", "figure-bytes", "figure-clients", "figure-divergence", "figure-balance");
    });
    by("legend").append(element("label", {}, box, swatch(label), name));
  });
  const point = by("point");
  fill(point, data.points.map((name, i) => [i, name]));
  by("setting").hidden = data.points.length < 2;
  by("bar").hidden = data.points.length < 2 && data.labels.length < 2;
  point.addEventListener("change", () => {
    state.point = Number(point.value);
    fillSeeds();
    fillConfusions();
    fillExperts();
    redraw();
  });
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());

  fillSeeds();
  fillConfusions();
  fillExperts();
  let drawn = 0;
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${by("bar").offsetHeight}px`);
    if (width() !== drawn) {
      drawn = width();
      redraw();
    }
  }).observe(document.querySelector("main"));
})();
