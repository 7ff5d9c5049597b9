// The claims by verdict: a choice above the table hides the rows and sections of all other verdicts.

const place = document.getElementById("verdicts");
const rows = [...document.querySelectorAll("table")].find((table) => table.querySelector('a[href^="#claim-"]')).querySelectorAll("tbody tr");
const claims = [...rows].map((row) => ({
  row,
  section: document.getElementById(row.querySelector("a").getAttribute("href").slice(1)),
  verdict: row.cells[2].innerText.trim(),
}));

function choose(verdict) {
  let count = 0;
  for (const claim of claims) {
    const shown = verdict === "all" || claim.verdict === verdict;
    claim.row.hidden = claim.section.hidden = !shown;
    count += shown;
  }
  said.textContent = `${count} of ${claims.length} claims`;
}

const choices = document.createElement("fieldset");
choices.className = "choices";
choices.innerHTML = "<legend>Verdict</legend>";
for (const verdict of ["all", ...place.dataset.verdicts.split(", ")]) {
  const label = document.createElement("label"), button = document.createElement("input");
  Object.assign(button, { type: "radio", name: "verdict", value: verdict, checked: verdict === "all" });
  button.addEventListener("change", () => choose(verdict));
  label.append(button, ` ${verdict}`);
  choices.append(label);
}
const said = document.createElement("p");
said.setAttribute("role", "status");
place.append(choices, said);
choose("all");
// A link to one claim from elsewhere always finds it.
addEventListener("hashchange", () => document.querySelector(location.hash || "body").hidden && (choices.querySelector("input").click()));
