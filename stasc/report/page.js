"use strict";
// All text comes from models and data files. It becomes text nodes and nothing else.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const strata = data.strata.map(([run, iteration, split, transition, total]) => ({ run, iteration, split, transition, total }));
  const trajectories = data.trajectories.map(([stratum, question, chain]) => {
    const [id, text, references] = data.questions[question];
    const answers = chain.map(([number, reward, right, finished, pieces]) => ({ number, reward, right, finished, pieces }));
    const all = [id, text, ...references, ...answers.map((answer) => answer.pieces.join(""))];
    return { ...strata[stratum], id, text, references, answers, haystack: all.join("\n").toLowerCase() };
  });

  const STEP = 20;
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

  function answerBox({ reward, right, finished, pieces }, i) {
    const word = right ? "right" : "wrong";
    const verdict = element("span", word, ` r(y${i + 1}) = ${Number(reward.toFixed(3))}, ${word}`);
    const text = pieces.map((piece, at) => (at % 2 ? element("mark", "", piece) : piece));
    const parts = [element("h4", "", i ? "Correction" : "Initial answer", verdict), quoted("p", ...text)];
    if (!finished) parts.push(element("p", "meta", "cut at the token limit"));
    return element("section", "", ...parts);
  }

  function card(t) {
    const [before, after] = data.transitions[t.transition].split("_to_");
    const badge = element("span", `badge ${after}`, `${before} → ${after}`);
    const numbers = t.answers.map(({ number }, i) => `${i ? "correction" : "answer"} ${number}`);
    const where = `${data.runs[t.run]} · iteration ${t.iteration} · ${t.split} · question ${t.id}, ${numbers.join(", ")}`;
    const bdi = element("bdi", "", where);
    const references = element("p", "references", "References: ");
    t.references.forEach((reference, i) => references.append(i ? " · " : "", quoted("span", reference)));
    const answers = element("div", "answers", ...t.answers.map(answerBox));
    return element("li", "", element("article", "", element("p", "meta", badge, bdi), quoted("h3", t.text), references, answers));
  }

  function chosen() {
    const values = Object.fromEntries(new FormData(form));
    return (t) => ["run", "split", "iteration", "transition"].every((name) => values[name] === "" || String(t[name]) === values[name]);
  }

  function number(value) {
    return value.toLocaleString("en");
  }

  function report() {
    const total = strata.filter(chosen()).reduce((sum, stratum) => sum + stratum.total, 0);
    const shown = found.childElementCount;
    const here = trajectories.filter(chosen()).length;
    count.textContent = `${number(shown)} of ${number(matching.length)} matches are listed. With these settings `
      + `the runs have ${number(total)} trajectories, of which ${number(here)} are on this page.`;
    more.hidden = shown >= matching.length;
  }

  function list(from) {
    found.append(...matching.slice(from, from + STEP).map(card));
    report();
  }

  function search() {
    const wanted = form.elements.text.value.toLowerCase();
    matching = trajectories.filter(chosen()).filter((t) => t.haystack.includes(wanted));
    found.replaceChildren();
    list(0);
  }

  function fill(name, options) {
    const select = form.elements[name];
    select.append(new Option("all", ""));
    for (const [value, label] of options) select.append(new Option(label, value));
  }

  function values(name) {
    return [...new Set(strata.map((stratum) => stratum[name]))].map((value) => [value, value]);
  }

  fill("run", data.runs.map((name, i) => [i, name]));
  fill("split", values("split"));
  fill("iteration", values("iteration").sort(([a], [b]) => a - b));
  fill("transition", data.transitions.map((name, i) => [i, name.replace("_to_", " → ")]));
  form.addEventListener("input", search);
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
})();
