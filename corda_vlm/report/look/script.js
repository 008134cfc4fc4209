// Sorts tables, filters by method, and shows values on plots. The page reads the same without it.
(() => {
  "use strict";
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const made = (name, more = {}) => Object.assign(document.createElement(name), more);

  // ---------------------------------------------------------------- tables
  const numberIn = (text) => {
    const found = text.trim().replaceAll("−", "-").replaceAll(",", "").match(/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  const textOf = (row, column) => row.cells[column]?.textContent.trim() ?? "";

  const sorted = (rows, column, down) => {
    const numbers = rows.map((row) => numberIn(textOf(row, column)));
    const byNumber = numbers.some((value) => !Number.isNaN(value));
    const keyed = rows.map((row, place) => ({ row, place, number: numbers[place], text: textOf(row, column) }));
    keyed.sort((a, b) => {
      if (byNumber) {
        const [x, y] = [Number.isNaN(a.number), Number.isNaN(b.number)];
        if (x || y) return x - y || a.place - b.place; // what is no number comes last, either way
        return (down ? b.number - a.number : a.number - b.number) || a.place - b.place;
      }
      return (down ? -1 : 1) * a.text.localeCompare(b.text, undefined, { numeric: true }) || a.place - b.place;
    });
    return keyed.map((one) => one.row);
  };

  for (const table of all("table")) {
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    if (!table.tHead || rows.length < 2) continue;
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = made("button", { type: "button", title: "sort by this column" });
      button.append(...heading.childNodes);
      heading.append(button);
      const first = rows.some((row) => !Number.isNaN(numberIn(textOf(row, column)))) ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      button.addEventListener("click", () => {
        const next = { [first]: second, [second]: null }[heading.getAttribute("aria-sort")];
        for (const other of headings) other.removeAttribute("aria-sort");
        const order = next === null ? null : next ?? first; // the third time it is as it was written
        if (order) heading.setAttribute("aria-sort", order);
        table.tBodies[0].append(...(order ? sorted(rows, column, order === "descending") : rows));
      });
    });
  }

  // ---------------------------------------------------------------- methods
  const owned = all("[data-method]");
  const methods = [...new Set(owned.map((element) => element.dataset.method))];
  const place = document.getElementById("filter");
  if (place && methods.length > 1) {
    const field = made("fieldset", { className: "filter" });
    field.append(made("legend", { textContent: "Methods shown" }));
    const boxes = methods.map((method) => {
      const label = made("label");
      const box = made("input", { type: "checkbox", checked: true, value: method });
      const color = owned.find((element) => element.dataset.method === method && element.dataset.color)?.dataset.color;
      label.append(box);
      if (color) {
        const dot = made("i");
        dot.style.background = color;
        label.append(dot);
      }
      label.append(method);
      field.append(label);
      return box;
    });
    const show = () => {
      const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
      for (const element of owned) element.classList.toggle("off", !wanted.has(element.dataset.method));
    };
    for (const [words, checked] of [["all", true], ["none", false]]) {
      const button = made("button", { type: "button", textContent: words });
      button.addEventListener("click", () => {
        for (const box of boxes) box.checked = checked;
        show();
      });
      field.append(button);
    }
    field.addEventListener("change", show);
    place.replaceWith(field);
  }

  // ---------------------------------------------------------------- plots
  for (const figure of all(".plot")) {
    const svg = figure.querySelector("svg");
    const points = all(".point", svg);
    const value = made("output", { className: "value" });
    value.hidden = true;
    figure.append(value);
    let at = -1;
    const say = (point) => {
      for (const other of points) other.classList.toggle("on", other === point);
      value.hidden = !point;
      if (!point) return;
      at = points.indexOf(point);
      value.textContent = point.querySelector("title").textContent;
      const [mark, room] = [point.getBoundingClientRect(), figure.getBoundingClientRect()];
      const left = mark.left + mark.width / 2 - room.left + 14;
      const most = room.width - value.offsetWidth;
      value.style.transform = `translate(${Math.max(0, Math.min(left, most))}px, ${mark.bottom - room.top + 4}px)`;
    };
    svg.addEventListener("pointerover", (event) => say(event.target.closest(".point")));
    svg.addEventListener("pointerleave", () => say(null));
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("blur", () => say(null));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") say(null);
      if (!step) return;
      event.preventDefault();
      const shown = points.filter((point) => !point.closest(".off"));
      if (!shown.length) return;
      const now = shown.indexOf(points[at]);
      say(shown[now < 0 ? 0 : (now + step + shown.length) % shown.length]);
    });
  }
})();
