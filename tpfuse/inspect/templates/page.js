"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const state = { graph: 0, rank: null, query: "", verdict: "all", reasons: new Set(), open: null };
  let cells = []; // one per site of the graph and rank on show: {index, site, text, differs, button, lane}

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const graph = () => data.graphs[state.graph];
  const ranksOf = (g) => g.variants.flatMap((v) => v.ranks).sort((a, b) => a - b);
  const variant = () => graph().variants.find((v) => v.ranks.includes(state.rank)) || graph().variants[0];
  const narrow = matchMedia("(max-width: 640px)");
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  /* Ranks as chips. One color a group, in order of appearance over all ranks, so that equal groups look equal. */
  const colors = new Map();
  function color(group) {
    const key = group.join();
    if (!colors.has(key)) colors.set(key, colors.size % 8);
    return colors.get(key);
  }
  function chips(group) {
    if (!group || !group.length) return make("span", { class: "chips" }, make("span", { class: "chip unknown", text: "unknown" }));
    const c = `chip g${color(group)}`;
    const run = group.every((r, i) => r === group[0] + i);
    const shown = group.length > 8 ? [run ? `${group[0]}\u2013${group[group.length - 1]}` : `${group.length} ranks`] : group;
    const list = make("span", { class: "chips", title: `ranks ${group.join(", ")}` });
    list.append(make("span", { class: "hidden-label", text: `ranks ${group.join(" ")}` }));
    for (const rank of shown) list.append(make("span", { class: c, text: rank, "aria-hidden": "true" }));
    return list;
  }

  /* Tables that came with the dump: groups, plan and row counts of an explanation. */
  function drawContext() {
    at("context").replaceChildren(...data.context.map((t) => make("details", { open: "" },
      make("summary", { text: t.title }),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t.title }, make("table", {},
        make("thead", {}, make("tr", {}, ...t.columns.map((c) => make("th", { scope: "col", text: c })))),
        make("tbody", {}, ...t.rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", { text: cell }))))))))));
    at("context").hidden = !data.context.length;
  }

  function drawGraphs() {
    at("graphs").replaceChildren(...data.graphs.map((g, index) => {
      const sites = g.variants[0].sites;
      const fused = sites.filter((s) => s.fused).length;
      const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("i"));
      bar.firstChild.style.width = `${sites.length ? (100 * fused) / sites.length : 0}%`;
      return make("li", {}, make("button", {
        type: "button", "aria-current": String(index === state.graph),
        onclick: () => show(index, null),
      },
      make("span", { class: "name" }, make("span", { text: g.name }), make("span", { class: "dim", text: `${fused}/${sites.length}` })),
      make("span", { class: "dim", text: plural(ranksOf(g).length, "rank") + (g.differences.length ? ", differ" : "") }),
      bar));
    }));
  }

  function figure(name, value, small, kind) {
    return make("div", { class: kind || "" }, make("dt", { text: name }),
      make("dd", {}, String(value), small ? make("small", { text: small }) : null));
  }

  function drawOverview() {
    const v = variant();
    const fused = v.sites.filter((s) => s.fused).length;
    const [launches, traffic] = v.saved.split(", ");
    const differing = new Set(graph().differences.map((d) => d.site)).size;
    const shared = v.layers.filter((l) => l.shared).length;
    at("graph-name").textContent = graph().name;
    at("settings").textContent = `rank ${state.rank} of ${graph().world}, ${v.settings}`;
    at("figures").replaceChildren(...[
      figure("All-reduces", v.sites.length),
      figure("Fused", fused, "", "fused"),
      figure("Kept", v.sites.length - fused, "", "kept"),
      v.layers.length ? figure("Shared layers", shared, `of ${v.layers.length}`) : null,
      figure("Saved per call (estimate)", launches, traffic ? `and ${traffic} of memory traffic on each rank` : "", "wide"),
      ranksOf(graph()).length > 1 ? figure("Ranks differ on", plural(differing, "site"), "", differing ? "differ" : "") : null,
    ].filter(Boolean));
    at("messages").replaceChildren(
      ...graph().differences.map((d) => make("p", { class: "message differ" },
        make("span", {}, make("strong", { text: `Ranks differ on site ${d.site}. ` }), sentence(d.text)),
        make("button", { type: "button", class: "quiet", text: "Show", onclick: () => { clearFilters(); state.rank = d.ranks[0]; render(); toggle(d.site, true); } }))),
      ...v.notes.map((note) => make("p", { class: "message", text: note })));
  }

  function drawFilters() {
    at("verdicts").replaceChildren(...["all", "fused", "kept"].map((name) => make("button", {
      type: "button", "aria-pressed": String(state.verdict === name), text: name[0].toUpperCase() + name.slice(1),
      onclick: () => { state.verdict = name; drawFilters(); filter(); },
    })));
    const counts = new Map();
    for (const site of variant().sites) if (!site.fused) counts.set(site.reason, (counts.get(site.reason) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    at("reasons").replaceChildren(...sorted.map(([reason, count]) => make("button", {
      type: "button", "data-reason": reason, "aria-pressed": String(state.reasons.has(reason)), title: data.remedies[reason] || "",
      onclick: () => { state.reasons.has(reason) ? state.reasons.delete(reason) : state.reasons.add(reason); drawFilters(); focusReason(reason); filter(); },
    }, reason, make("span", { text: count }))));
    const ranks = ranksOf(graph());
    at("rank-choice").hidden = ranks.length < 2;
    at("rank").replaceChildren(...ranks.map((r) => make("option", { value: r, text: r })));
    at("rank").value = String(state.rank);
  }
  function focusReason(reason) {
    const button = at("reasons").querySelector(`[data-reason="${CSS.escape(reason)}"]`);
    if (button) button.focus();
  }
  function clearFilters() {
    state.query = ""; state.verdict = "all"; state.reasons.clear(); at("search").value = "";
  }

  /* Lanes: one row a layer with attention beside MLP; a site without a layer has a row of its own. */
  function drawLanes() {
    const v = variant();
    const rows = new Map();
    v.sites.forEach((site, index) => {
      const key = site.layer === null ? `alone ${index}` : site.layer;
      if (!rows.has(key)) rows.set(key, []);
      rows.get(key).push([index, site]);
    });
    const differs = new Set(graph().differences.map((d) => d.site));
    cells = [];
    const lanes = [...rows.values()].map((row) => lane(row, v, differs));
    at("sites").replaceChildren(
      make("div", { class: "columns", "aria-hidden": "true" }, make("span"), make("span", { text: "Attention" }), make("span", { text: "MLP" })),
      ...lanes, make("p", { class: "empty", id: "empty", text: "No all-reduce matches the filters.", hidden: "" }));
  }

  function lane(row, v, differs) {
    const layer = row[0][1].layer;
    const audit = v.layers.find((l) => l.layer === layer);
    const shared = audit && audit.shared !== null ? (audit.shared ? "shared" : "not shared") : "";
    const label = make("div", { class: "label", title: audit ? audit.detail : null }, layer === null ? name(row[0][1].role) : `Layer ${layer}`,
      shared ? make("small", { text: shared }) : null);
    const element = make("div", { class: "lane" }, label);
    const stacks = layer === null ? [["", row]] : [
      ["attention", row.filter(([, s]) => s.role !== "mlp")], ["mlp", row.filter(([, s]) => s.role === "mlp")]];
    for (const [role, sites] of stacks) {
      const stack = make("div", { class: role ? "stack" : "stack wide", "data-role": role && sites.length ? role : null });
      for (const [index, site] of sites) {
        const button = block(index, site, differs.has(index));
        stack.append(button);
        cells.push({ index, site, button, lane: element, differs: differs.has(index), text: searchable(site) });
      }
      element.append(stack);
    }
    return element;
  }
  const name = (role) => role[0].toUpperCase() + role.slice(1);

  function block(index, site, differs) {
    const steps = make("span", { class: "steps" }, ...site.steps.map((step) => make("span", { text: step })));
    if (!site.fused) steps.append(make("span", { class: "why", text: site.reason }));
    return make("button", {
      type: "button", class: `site ${site.fused ? "fused" : "kept"}`, "data-site": index, "aria-expanded": "false",
      onclick: () => toggle(index),
    },
    make("span", { class: "hidden-label", text: `${site.title}, ${site.fused ? "fused" : "kept"}: ` }), steps,
    differs ? make("span", { class: "badge", text: "ranks differ" }) : null, chips(site.group),
    site.fused ? null : make("span", { class: "note", text: site.miss || site.detail }));
  }

  const searchable = (s) => [s.title, s.reason, s.detail, s.miss, s.source, s.line, s.shape, s.flavour, s.steps.join("+"),
    s.group.join(), ...s.before.map((n) => n.code)].join(" ").toLowerCase();

  function matches(cell, word) {
    const layer = /^layer\s+(\d+)$/.exec(word); // a number alone would match half of all shapes and names
    return layer ? cell.site.layer === Number(layer[1]) : cell.text.includes(word);
  }

  function filter() {
    const words = state.query.toLowerCase().match(/layer\s+\d+|\S+/g) || [];
    let shown = 0;
    for (const cell of cells) {
      const ok = (state.verdict === "all" || cell.site.fused === (state.verdict === "fused"))
        && (!state.reasons.size || state.reasons.has(cell.site.reason))
        && words.every((word) => matches(cell, word));
      cell.button.hidden = !ok;
      if (ok) shown += 1;
    }
    const visible = new Set(cells.filter((c) => !c.button.hidden).map((c) => c.lane));
    let last = null;
    for (const element of at("sites").querySelectorAll(".lane")) {
      element.hidden = !visible.has(element);
      element.classList.remove("last");
      if (!element.hidden) last = element;
    }
    if (last) last.classList.add("last");
    at("empty").hidden = shown > 0;
    at("count").textContent = shown === cells.length ? plural(shown, "all-reduce") : `${shown} of ${plural(cells.length, "all-reduce")}`;
    const open = cells.find((c) => c.index === state.open);
    if (open && open.button.hidden) close(false);
  }

  /* Detail of one site, inside its lane. */
  function toggle(index, always) {
    if (state.open === index && !always) { close(true); return; }
    close(false);
    const cell = cells.find((c) => c.index === index);
    if (!cell) return;
    state.open = index;
    cell.button.setAttribute("aria-expanded", "true");
    const panel = detail(cell);
    cell.button.setAttribute("aria-controls", panel.id);
    if (narrow.matches) cell.button.after(panel); else cell.lane.append(panel);
    cell.button.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
    remember();
  }
  function close(focus) {
    const cell = cells.find((c) => c.index === state.open);
    state.open = null;
    const panel = at("detail");
    if (panel) panel.remove();
    if (cell) {
      cell.button.setAttribute("aria-expanded", "false");
      cell.button.removeAttribute("aria-controls");
      if (focus) cell.button.focus();
    }
    remember();
  }

  function detail({ index, site }) {
    const mine = graph().differences.filter((d) => d.site === index);
    const story = make("div", { class: "story" });
    if (site.detail && !site.miss && site.detail !== site.flavour) story.append(make("p", { text: sentence(site.detail) }));
    if (site.miss) story.append(make("p", {}, make("strong", { text: "Nearest miss: " }), site.miss + "."));
    if (!site.fused && data.remedies[site.reason]) story.append(make("p", {}, make("strong", { text: "What to do: " }), data.remedies[site.reason]));
    const facts = make("dl", { class: "facts" },
      fact("Source", make("span", {}, make("code", { text: site.source || "unknown" }), site.line ? make("code", { class: "dim", text: site.line }) : null), true),
      fact("Ranks that are summed", chips(site.group)),
      fact("Group shared by attention and MLP", site.shared === null ? "not known" : site.shared ? "yes" : "no"),
      site.admitted ? fact("Admitted", sentence(site.admitted)) : null,
      fact("Sum", `${site.shape}${site.bytes ? `, ${site.bytes}` : ""}`),
      fact(site.fused ? "Saved per call (estimate)" : "Would save per call (estimate)", `${site.saved} of memory traffic`),
      site.eps === null ? null : fact("eps", site.eps.toExponential()),
      site.flavour ? fact("Rounding", site.flavour) : null,
      site.quantizer ? fact("Quantization", site.quantizer) : null);
    const panel = make("section", { class: "detail", id: "detail", "aria-label": `Detail of ${site.title}` },
      make("header", {}, make("h3", { text: site.title }),
        make("span", { class: `state ${site.fused ? "fused" : "kept"}`, text: site.fused ? "fused" : `kept: ${site.reason}` }),
        make("span", { class: "dim", text: `site ${index}` }),
        make("button", { type: "button", class: "quiet", text: "Close", onclick: () => close(true) })),
      story.childElementCount ? story : null, facts,
      make("div", { class: "sides" }, side("Before", site.before, ""), side("After", site.after, site.fused && !site.lowered ? "" : "unchanged")));
    for (const d of mine) panel.append(make("p", { class: "differs" }, make("strong", { text: "Ranks differ. " }), sentence(d.text)));
    return panel;
  }
  const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
  function fact(title, value, full) {
    return make("div", { class: full ? "full" : "" }, make("dt", { text: title }), make("dd", {}, value));
  }

  /* Lines may break after a dot, bracket or underscore rather than anywhere. */
  const breakable = (text) => text.split(/(?<=[._(])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

  function side(title, nodes, remark) {
    const count = nodes.length ? plural(nodes.length, "node") : "";
    const list = make("ol", { class: "nodes" });
    if (!nodes.length) list.append(make("li", { class: "none", text: "The dump holds no nodes for this site." }));
    for (const node of nodes) {
      const match = /^(\w+)(?:: "([^"]*)")? = (.*)$/s.exec(node.code);
      const code = match ? make("code", {}, make("span", { class: "name", text: match[1] }),
        match[2] ? make("span", { class: "type", text: ` ${match[2]}` }) : null, ` = `, ...breakable(match[3].replace(/torch\.ops\./g, "")))
        : make("code", { text: node.code });
      list.append(make("li", { title: node.source ? `${node.source}  ${node.text}` : null }, code, make("span", { class: "size", text: node.bytes })));
    }
    return make("div", {}, make("h4", {}, title, make("span", { text: [count, remark].filter(Boolean).join(", ") })), list);
  }

  /* Which graph, rank and site are on show lives in the address, so that a link leads to a site. */
  function remember() {
    const parts = [`g=${state.graph}`, `r=${state.rank}`];
    if (state.open !== null) parts.push(`s=${state.open}`);
    try { history.replaceState(null, "", `#${parts.join("&")}`); } catch { /* a sandboxed frame has no history */ }
  }
  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const g = Number(wanted.get("g"));
    if (Number.isInteger(g) && g >= 0 && g < data.graphs.length) state.graph = g;
    state.rank = wanted.has("r") ? Number(wanted.get("r")) : null;
    return wanted.has("s") ? Number(wanted.get("s")) : null;
  }

  function render() {
    const ranks = ranksOf(graph());
    if (!ranks.includes(state.rank)) state.rank = ranks[0];
    state.open = null;
    drawGraphs(); drawOverview(); drawFilters(); drawLanes(); filter(); remember();
  }
  function show(index, rank) {
    state.graph = index; state.rank = rank;
    clearFilters();
    render();
  }

  function move(step) {
    const visible = cells.filter((c) => !c.button.hidden);
    if (!visible.length) return;
    const focused = document.activeElement;
    const here = visible.findIndex((c) => c.button === focused || (focused.closest && focused.closest("#detail") && c.index === state.open));
    const next = here < 0 ? (step > 0 ? 0 : visible.length - 1) : Math.min(visible.length - 1, Math.max(0, here + step));
    visible[next].button.focus();
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape") {
      if (event.target === at("search") && state.query) { at("search").value = ""; state.query = ""; filter(); }
      else if (typing) event.target.blur();
      else if (state.open !== null) close(true);
      return;
    }
    if (typing) return;
    if (event.key === "/") { event.preventDefault(); at("search").focus(); at("search").select(); }
    else if (event.key === "j" || (event.key === "ArrowDown" && event.target.classList.contains("site"))) { event.preventDefault(); move(1); }
    else if (event.key === "k" || (event.key === "ArrowUp" && event.target.classList.contains("site"))) { event.preventDefault(); move(-1); }
  });
  at("search").addEventListener("input", () => { state.query = at("search").value; filter(); });
  at("rank").addEventListener("change", () => { state.rank = Number(at("rank").value); const open = state.open; render(); if (open !== null) toggle(open, true); });

  /* Theme: the system's until the reader chooses. */
  const system = matchMedia("(prefers-color-scheme: dark)");
  const store = { get: () => { try { return localStorage.getItem("tpfuse-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("tpfuse-theme", value); } catch { /* private mode */ } } };
  let theme = store.get() || "auto";
  function paint() {
    document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
    at("theme").textContent = `Theme: ${theme}`;
  }
  at("theme").addEventListener("click", () => {
    theme = { auto: "light", light: "dark", dark: "auto" }[theme]; store.set(theme); paint();
  });
  system.addEventListener("change", paint);
  paint();

  for (const g of data.graphs) for (const v of g.variants) for (const s of v.sites) if (s.group.length) color(s.group);
  drawContext();
  const wanted = recall();
  render();
  if (wanted !== null) toggle(wanted, true);
})();
