// Draw a digit: three small networks answer, in this page alone, without a server.
// kdlib/book/demo.py does the same in Python, and the tests compare the two.
(() => {
  "use strict";
  const BOX = 20, SIZE = 28;
  const here = document.currentScript.src;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);

  // ---- the networks

  const unpack = (layer) => ({
    inputs: layer.inputs,
    weight: new Int8Array(bytes(layer.weight).buffer),
    scale: floats(layer.scale),
    bias: floats(layer.bias),
  });

  function logits(layers, pixels) {
    let values = pixels;
    layers.forEach(({ inputs, weight, scale, bias }, depth) => {
      const next = new Float32Array(bias.length);
      for (let row = 0; row < bias.length; row++) {
        let sum = 0;
        const start = row * inputs;
        for (let i = 0; i < inputs; i++) sum += weight[start + i] * values[i];
        sum = sum * scale[row] + bias[row];
        next[row] = depth < layers.length - 1 ? Math.max(sum, 0) : sum;
      }
      values = next;
    });
    return [...values];
  }

  function soften(values, temperature) {
    const top = Math.max(...values);
    const powers = values.map((v) => Math.exp((v - top) / temperature));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((p) => p / sum);
  }

  // ---- a drawing as MNIST would have it

  // The mean of each of `parts` equal parts of start … end, as weights of whole places.
  function means(start, end, parts) {
    return Array.from({ length: parts }, (_, part) => {
      const from = start + ((end - start) * part) / parts;
      const to = start + ((end - start) * (part + 1)) / parts;
      const found = [];
      for (let place = Math.floor(from); place < to; place++) {
        const covered = Math.min(to, place + 1) - Math.max(from, place);
        if (covered > 0) found.push([place, (covered * parts) / (end - start)]);
      }
      return found;
    });
  }

  // Where a line of ink begins, so that its centre of mass is at 14 and all of it fits.
  function begin(line) {
    const total = line.reduce((a, b) => a + b);
    const centre = line.reduce((sum, ink, place) => sum + ink * place, 0) / total;
    return Math.min(Math.max(Math.floor(SIZE / 2 - centre + 0.5), 0), SIZE - line.length);
  }

  function ends(marks) {
    return [marks.indexOf(true), marks.lastIndexOf(true) + 1];
  }

  // ink: width × width values from 0 to 1, row by row. null if there is none.
  function prepared(ink, width) {
    const marks = (at) =>
      Array.from({ length: width }, (_, a) => {
        for (let b = 0; b < width; b++) if (ink[at(a, b)] > 0) return true;
        return false;
      });
    const [top, bottom] = ends(marks((row, column) => row * width + column));
    const [left, right] = ends(marks((column, row) => row * width + column));
    if (top < 0) return null;
    const longer = Math.max(bottom - top, right - left);
    const parts = (from, to) => Math.max(1, Math.round((BOX * (to - from)) / longer));
    const down = means(top, bottom, parts(top, bottom));
    const across = means(left, right, parts(left, right));
    const narrow = Array.from({ length: width }, (_, row) =>
      across.map((part) => part.reduce((sum, [c, w]) => sum + w * ink[row * width + c], 0))
    );
    const small = down.map((part) =>
      across.map((_, c) => part.reduce((sum, [row, w]) => sum + w * narrow[row][c], 0))
    );
    const y = begin(small.map((row) => row.reduce((a, b) => a + b)));
    const x = begin(across.map((_, c) => small.reduce((sum, row) => sum + row[c], 0)));
    const placed = new Float32Array(SIZE * SIZE);
    small.forEach((row, r) => row.forEach((v, c) => (placed[(y + r) * SIZE + x + c] = v)));
    return placed;
  }

  // ---- the page

  const figure = document.getElementById("kd-draw");
  const find = (selector) => figure.querySelector(selector);
  const paper = find("canvas.kd-paper"), seen = find("canvas.kd-seen");
  const pen = paper.getContext("2d", { willReadFrequently: true });
  const slider = find("input[type=range]"), status = find("[role=status]");
  const panels = [...figure.querySelectorAll("[data-network]")];
  const width = paper.width;
  for (const panel of panels) {
    panel.insertAdjacentHTML(
      "beforeend",
      `<div class="kd-bars" role="img">${'<i class="kd-bar"></i>'.repeat(10)}</div>` +
        `<div class="kd-names" aria-hidden="true">${[...Array(10).keys()].map((d) => `<i>${d}</i>`).join("")}</div><span></span>`
    );
  }
  for (let label = 0; label < 10; label++) {
    find(".kd-examples").insertAdjacentHTML(
      "beforeend", `<button type="button" data-label="${label}" aria-label="example digit ${label}">${label}</button>`
    );
  }
  let networks = null, pixels = null, last = null, answers = null;

  // At the first stroke, so that the page itself stays small.
  let loading = null;
  function load() {
    loading ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = here.replace("draw.js", "draw-weights.js");
      script.onload = () => {
        networks = {};
        for (const name in window.kdNetworks) networks[name] = window.kdNetworks[name].map(unpack);
        delete window.kdNetworks;
        resolve();
      };
      script.onerror = () => {
        status.textContent = "The networks could not be loaded: draw-weights.js is missing.";
        reject(new Error("draw-weights.js is missing"));
      };
      document.head.append(script);
    });
    return loading;
  }

  function ink() {
    const drawn = pen.getImageData(0, 0, width, width).data;
    return Float32Array.from({ length: width * width }, (_, i) => drawn[4 * i + 3] / 255);
  }

  function showPixels() {
    const context = seen.getContext("2d");
    const image = context.createImageData(SIZE, SIZE);
    for (let i = 0; i < SIZE * SIZE; i++) {
      const grey = 255 - Math.round(255 * (pixels ? pixels[i] : 0));
      image.data.set([grey, grey, grey, 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }

  const percent = (p) => `${(100 * p).toFixed(p > 0.0995 ? 0 : 1)} %`;

  function showAnswers() {
    const temperature = 10 ** slider.value;
    const name = temperature.toPrecision(2);
    find("output").value = name;
    slider.setAttribute("aria-valuetext", `T = ${name}`);
    const soft = answers && Object.fromEntries(
      Object.entries(answers).map(([key, values]) => [key, soften(values, temperature)])
    );
    const said = [];
    for (const panel of panels) {
      const p = soft ? soft[panel.dataset.network] : Array(10).fill(0);
      const order = [...p.keys()].sort((a, b) => p[b] - p[a]);
      [...panel.querySelectorAll(".kd-bar")].forEach((bar, digit) => {
        bar.style.height = `${100 * p[digit]}%`;
      });
      const label = panel.querySelector("b").textContent;
      const text = soft ? `${order[0]} (${percent(p[order[0]])}), then ${order[1]} (${percent(p[order[1]])})` : "–";
      panel.querySelector("span").textContent = text;
      const all = p.map((value, digit) => `${digit}: ${percent(value)}`).join(", ");
      panel.querySelector(".kd-bars").setAttribute("aria-label", soft ? `${label}: ${all}` : `${label}: no answer yet`);
      said.push(`${label}: ${text}`);
    }
    if (!soft) return;
    const shared = (a) => percent(soft.teacher.reduce((sum, p, digit) => sum + Math.min(p, a[digit]), 0));
    find(".kd-agreement").textContent =
      `Probability shared with the teacher at T = ${name}: ` +
      `${shared(soft.distilled)} for the distilled student, ${shared(soft.plain)} for the plain one. ` +
      `All three networks took ${last.toFixed(1)} ms.`;
    status.textContent = `${said.join("; ")}.`;
  }

  async function evaluate(image) {
    pixels = image;
    showPixels();
    await load();
    if (!pixels) return;
    const start = performance.now();
    answers = Object.fromEntries(
      Object.entries(networks).map(([name, layers]) => [name, logits(layers, pixels)])
    );
    last = performance.now() - start;
    showAnswers();
  }

  function clear() {
    pen.clearRect(0, 0, width, width);
    pixels = answers = null;
    showPixels();
    showAnswers();
    find(".kd-agreement").textContent = status.textContent = "";
  }

  function example(label) {
    clear();
    const raw = bytes(window.kdExamples[label]);
    const image = Float32Array.from(raw, (v) => v / 255);
    const cell = width / SIZE;
    for (let i = 0; i < image.length; i++) {
      if (!raw[i]) continue;
      pen.globalAlpha = image[i];
      pen.fillRect((i % SIZE) * cell, Math.floor(i / SIZE) * cell, cell, cell);
    }
    pen.globalAlpha = 1;
    return evaluate(image); // the image itself: MNIST has prepared it already
  }

  // ---- mouse, finger, keyboard

  let stroke = null;
  const place = (event) => {
    const box = paper.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * width) / box.width,
      ((event.clientY - box.top) * width) / box.height,
    ];
  };
  function draw(event) {
    const point = place(event);
    pen.lineWidth = 22;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...stroke);
    pen.lineTo(...point);
    pen.stroke();
    stroke = point;
  }
  let fresh = true; // an example goes when the reader starts to draw
  paper.addEventListener("pointerdown", (event) => {
    if (!fresh) clear();
    fresh = true;
    load();
    paper.setPointerCapture(event.pointerId);
    stroke = place(event);
    draw(event);
    event.preventDefault();
  });
  paper.addEventListener("pointermove", (event) => {
    if (stroke) draw(event);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    paper.addEventListener(end, () => {
      if (!stroke) return;
      stroke = null;
      evaluate(prepared(ink(), width));
    });
  }
  slider.addEventListener("input", showAnswers);
  find(".kd-clear").addEventListener("click", clear);
  find(".kd-examples").addEventListener("click", (event) => {
    if (!event.target.dataset.label) return;
    fresh = false;
    example(event.target.dataset.label);
  });
  showPixels();
  showAnswers();
  figure.hidden = false;

  // For the tests.
  window.kdDraw = {
    load, ink, prepared, width,
    answers: async (image) => {
      await load();
      return Object.fromEntries(Object.keys(networks).map((n) => [n, logits(networks[n], image)]));
    },
    pixels: () => [...pixels],
  };
})();
