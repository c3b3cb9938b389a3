"use strict";
// All text comes from models and data files. It becomes text nodes and nothing else.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const strata = data.strata.map(([run, iteration, split, transition, total]) => (
    { run: data.runs[run], iteration, split, transition: data.transitions[transition], total }
  ));
  const trajectories = data.trajectories.map(([stratum, question, chain]) => {
    const [id, text, references] = data.questions[question];
    const answers = chain.map(([number, reward, right, finished, pieces]) => ({ number, reward, right, finished, pieces }));
    const all = [id, text, ...references, ...answers.map((answer) => answer.pieces.join(""))];
    return { ...strata[stratum], question: id, text, references, answers, haystack: all.join("\n").toLowerCase() };
  });

  const STEP = 20;
  const LONG = 900; // characters of an answer from which on it is folded
  const PLACE = "#trajectories?"; // followed by the filters
  const STRATUM = ["run", "split", "iteration", "transition"];
  const form = document.getElementById("filters");
  const count = document.getElementById("count");
  const found = document.getElementById("found");
  const more = document.getElementById("more");
  let matching = [];

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  function quoted(tag, ...children) {
    const made = element(tag, "quoted", ...children);
    made.dir = "auto";
    return made;
  }

  function folding(paragraph) {
    const button = element("button", "fold");
    function fold(folded) {
      paragraph.classList.toggle("folded", folded);
      button.textContent = folded ? "Show all" : "Fold";
      button.setAttribute("aria-expanded", String(!folded));
    }
    button.type = "button";
    button.addEventListener("click", () => fold(!paragraph.classList.contains("folded")));
    fold(true);
    return [paragraph, button];
  }

  function answerBox({ reward, right, finished, pieces }, i) {
    const word = right ? "right" : "wrong";
    const verdict = element("span", word, ` r(y${i + 1}) = ${Number(reward.toFixed(3))}, ${word}`);
    const text = pieces.map((piece, at) => (at % 2 ? element("mark", "", piece) : piece));
    const paragraph = quoted("p", ...text);
    const shown = paragraph.textContent.length > LONG ? folding(paragraph) : [paragraph];
    const parts = [element("h4", "", i ? "Correction" : "Initial answer", verdict), ...shown];
    if (!finished) parts.push(element("p", "meta", "cut at the token limit"));
    return element("section", "", ...parts);
  }

  function card(t) {
    const [before, after] = t.transition.split("_to_");
    const badge = element("span", `badge ${after}`, `${before} → ${after}`);
    const numbers = t.answers.map(({ number }, i) => `${i ? "correction" : "answer"} ${number}`);
    const where = `${t.run} · iteration ${t.iteration} · ${t.split} · question ${t.question}, ${numbers.join(", ")}`;
    const bdi = element("bdi", "", where);
    const references = element("p", "references", "References: ");
    t.references.forEach((reference, i) => references.append(i ? " · " : "", quoted("span", reference)));
    const answers = element("div", "answers", ...t.answers.map(answerBox));
    const here = trajectories.filter((other) => other.question === t.question).length;
    const follow = element("a", "", `Follow this question through iterations and systems (${here} on this page)`);
    follow.href = PLACE + new URLSearchParams({ question: t.question });
    const parts = [element("p", "meta", badge, bdi), quoted("h3", t.text), references, answers, element("p", "follow", follow)];
    return element("li", "", element("article", "", ...parts));
  }

  function chosen(names) {
    const values = Object.fromEntries(new FormData(form));
    return (t) => names.every((name) => values[name] === "" || String(t[name]) === values[name]);
  }

  function number(value) {
    return value.toLocaleString("en");
  }

  function report() {
    const total = strata.filter(chosen(STRATUM)).reduce((sum, stratum) => sum + stratum.total, 0);
    const shown = found.childElementCount;
    const here = trajectories.filter(chosen(STRATUM)).length;
    count.textContent = `${number(shown)} of ${number(matching.length)} matches are listed. With these runs, splits, iterations and transitions `
      + `there are ${number(total)} trajectories, of which ${number(here)} are on this page.`;
    more.hidden = shown >= matching.length;
  }

  function list(from) {
    found.append(...matching.slice(from, from + STEP).map(card));
    report();
  }

  function search() {
    const wanted = form.elements.text.value.toLowerCase();
    matching = trajectories.filter(chosen([...STRATUM, "question"])).filter((t) => t.haystack.includes(wanted));
    found.replaceChildren();
    list(0);
  }

  // The filters stand in the address, so that what is shown can be linked to.
  function write() {
    const set = [...new FormData(form)].filter(([, value]) => value !== "");
    history.replaceState(null, "", PLACE + new URLSearchParams(set));
  }

  function read() {
    if (!location.hash.startsWith(PLACE)) return;
    form.reset();
    for (const [name, value] of new URLSearchParams(location.hash.slice(PLACE.length))) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    search();
    document.getElementById("trajectories").scrollIntoView({ behavior: "instant" });
  }

  function fill(name, values) {
    const select = form.elements[name];
    select.append(new Option("all", ""));
    for (const value of values) select.append(new Option(String(value).replace("_to_", " → "), value));
  }

  function values(name) {
    return [...new Set(strata.map((stratum) => stratum[name]))];
  }

  // A click on a column's heading sorts the rows of each group, a click on it again the other way round.
  function sortKey(row, column) {
    const text = row.cells[column].textContent.trim();
    const digits = text.replace("−", "-").replaceAll(",", "").match(/^[<+ ]*(-?\d+(\.\d+)?)/);
    return { text, number: digits ? Number(digits[1]) : null };
  }

  function sort(table, column, descending) {
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      const keys = new Map(rows.map((row) => [row, sortKey(row, column)]));
      const filled = [...keys.values()].filter(({ text }) => !/^–?$/.test(text));
      const numbers = filled.every(({ number }) => number !== null); // a row without one goes last
      rows.sort((a, b) => {
        const [one, other] = [keys.get(a), keys.get(b)];
        const missing = (one.number === null) - (other.number === null);
        if (numbers && missing) return missing;
        const order = numbers ? one.number - other.number : one.text.localeCompare(other.text, "en");
        return descending ? -order : order;
      });
      body.append(...rows);
    }
  }

  for (const table of document.querySelectorAll("table")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = element("button", "", ...heading.childNodes);
      button.type = "button";
      button.title = "Sort";
      button.addEventListener("click", () => {
        const before = heading.getAttribute("aria-sort");
        const descending = before ? before === "ascending" : column > 0;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, descending);
      });
      heading.append(button);
    });
  }

  fill("run", data.runs);
  fill("split", values("split"));
  fill("iteration", values("iteration").sort((a, b) => a - b));
  fill("transition", data.transitions);
  form.addEventListener("input", () => {
    write();
    search();
  });
  addEventListener("hashchange", read);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = found.childElementCount;
    list(next);
    const card = found.children[next];
    card.tabIndex = -1;
    card.focus();
  });
  form.hidden = false;
  search();
  read();
})();
