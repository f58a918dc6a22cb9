"use strict";
(() => {
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const stored = () => { try { return localStorage.getItem("tiesmith-theme"); } catch { return null; } };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = theme + " theme";
    button.value = theme;
    try { localStorage.setItem("tiesmith-theme", theme); } catch { /* not from every place */ }
  };
  setTheme(themes.includes(stored()) ? stored() : "auto");
  button.addEventListener("click", () => setTheme(themes[(themes.indexOf(button.value) + 1) % 3]));

  // Titles in figures become a tip that also shows at a touch.
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("figure svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const target = event.target.closest && event.target.closest("[data-tip]");
    if (!target) { tip.hidden = true; return; }
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, event.clientX + 14), innerWidth - box.width - 8);
    const above = event.clientY + 18 + box.height > innerHeight;
    tip.style.left = left + "px";
    tip.style.top = (above ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const significant = (x) => {
    const size = Math.abs(x);
    if (x === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return x.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return String(+x.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(size))))));
  };
  const text = (x) => x;
  const whole = (x) => x.toLocaleString("en-US");
  // In a column all have three digits: 20.0 beside 20.9.
  const share = (x) => {
    const size = Math.abs(x * 100);
    const plain = size >= 1e-3 && size < 99.95;
    return (plain ? (x * 100).toFixed(Math.max(0, 2 - Math.floor(Math.log10(size)))) : significant(x * 100)) + " %";
  };
  const data = JSON.parse(document.getElementById("data").textContent);

  // Column: heading, how a value is written, whether it is shaded, what it means, whether it needs two models.
  const numbers = [
    ["parameters", whole, false, "merged elements"],
    ["kept", share, true, "entries that survive the trim, over all models"],
    ["conflict", share, true, "parameters whose survivors disagree in sign", true],
    ["cosine", significant, true, "mean cosine of pairs of trimmed task vectors", true],
    ["survives", share, true, "of the entries kept, those that point the merged way", true],
    ["of norm", share, true, "share of the task vectors' squared length, mean over models"],
    ["zero", share, true, "entries that no training step changed"],
  ];
  const grouped = (name) => [[name, text, false, name], ["tensors", whole, false, "number of tensors"], ...numbers];
  const columns = {
    models: [
      ["model", text, false, "as given"],
      ["norm", significant, true, "length of the task vector"],
      ["mean |τ|", significant, true, "mean magnitude of its entries"],
      ["zero", share, true, "entries that no training step changed"],
      ["kept", share, true, "entries that survive the trim"],
      ["tied", share, true, "entries equal to the threshold"],
      ["norm kept", share, true, "squared length that the entries kept hold"],
      ["survives", share, true, "of the entries kept, those that point the merged way", true],
      ["of mass", share, true, "their magnitude as a share of the whole task vector's", true],
      ["cosine", significant, true, "of the whole task vector with the merged one", true],
    ],
    layers: grouped("layer"),
    kinds: grouped("kind"),
    tensors: [["tensor", text, false, "its name"], ...numbers],
  };
  const FIRST = 200;

  const make = (tag, fields, ...children) => {
    const element = Object.assign(document.createElement(tag), fields);
    element.append(...children);
    return element;
  };

  for (const place of document.querySelectorAll("[data-table]")) {
    const id = place.dataset.table;
    const kept = columns[id].map((column, at) => [column, at]).filter(([column]) => data.two || !column[4]);
    const rows = data[id];
    const most = kept.map(([column, at]) =>
      column[2] ? rows.reduce((top, row) => Math.max(top, Math.abs(row[at] ?? 0)), 0) : 0);
    let sorted = null, descending = true, needle = "", limit = FIRST;

    const body = make("tbody", {});
    const count = make("output", {});
    const more = make("button", { type: "button", className: "more" });
    more.addEventListener("click", () => { limit += 2000; draw(); });
    const heads = kept.map(([column, at]) => {
      const sort = make("button", { type: "button", textContent: column[0], title: column[3] });
      const head = make("th", { scope: "col" }, sort);
      sort.addEventListener("click", () => {
        descending = sorted === at ? !descending : at > 0;
        sorted = at;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        draw();
      });
      return head;
    });

    const draw = () => {
      let shown = needle ? rows.filter((row) => row[0].toLowerCase().includes(needle)) : rows.slice();
      if (sorted !== null) {
        const order = (a, b) => {
          const [x, y] = [a[sorted], b[sorted]];
          if (x === null || y === null) return (x === null) - (y === null);
          const natural = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
          return descending ? -natural : natural;
        };
        shown.sort(order);
      }
      const lines = document.createDocumentFragment();
      for (const row of shown.slice(0, limit)) {
        const line = make("tr", {});
        kept.forEach(([column, at], place) => {
          const value = row[at];
          const cell = make("td", { textContent: value === null ? "–" : column[1](value) });
          if (at === 0) cell.title = value;
          if (column[2] && value !== null && most[place] > 0 && rows.length > 1) {
            const shade = Math.abs(value) / most[place];
            const colour = value < 0 ? "var(--c1)" : "var(--c0)";
            if (id === "layers" || id === "kinds") {
              cell.style.background = `color-mix(in srgb, ${colour} ${(shade * 62).toFixed(0)}%, transparent)`;
            } else {
              const tint = `color-mix(in srgb, ${colour} 72%, transparent)`;
              const end = (shade * 100).toFixed(1);
              cell.style.background = `linear-gradient(90deg, ${tint} ${end}%, transparent ${end}%) bottom/100% 3px no-repeat`;
            }
          }
          line.append(cell);
        });
        lines.append(line);
      }
      body.replaceChildren(lines);
      count.textContent = `${whole(shown.length)} of ${whole(rows.length)}`;
      more.hidden = shown.length <= limit;
      more.textContent = `show more of ${whole(shown.length)}`;
    };

    if (id === "tensors" || rows.length > 30) {
      const search = make("input", { type: "search", placeholder: "search by name", autocomplete: "off" });
      search.setAttribute("aria-label", "search by name");
      search.addEventListener("input", () => { needle = search.value.trim().toLowerCase(); limit = FIRST; draw(); });
      place.append(make("div", { className: "tools" }, search, count));
    }
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    place.append(make("div", { className: "scroll", tabIndex: 0 }, table, more));
    draw();
  }
})();
