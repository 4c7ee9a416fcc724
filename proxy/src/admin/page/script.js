"use strict";
const main = document.querySelector("main"), filter = document.querySelector("#filter"), state = document.querySelector("#state");
function sift() {
  const wanted = filter.value.toLowerCase();
  for (const row of main.querySelectorAll("#flows tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(wanted);
}
async function refresh() {
  try {
    const answer = await fetch("live", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const scrolled = new Map([...main.querySelectorAll(".wide")].map((box, index) => [index, box.scrollTop]));
    main.innerHTML = await answer.text();
    main.querySelectorAll(".wide").forEach((box, index) => { box.scrollTop = scrolled.get(index) || 0; });
    sift();
    state.textContent = "live";
    document.body.dataset.refreshed = 1 + Number(document.body.dataset.refreshed || 0);
    document.body.classList.remove("stale");
  } catch (error) {
    state.textContent = "the proxy does not answer";
    document.body.classList.add("stale");
  }
  setTimeout(refresh, 2000);
}
main.addEventListener("click", (event) => {
  const command = event.target.dataset && event.target.dataset.copy;
  if (command && navigator.clipboard) navigator.clipboard.writeText(command).then(() => { event.target.textContent = "copied"; });
});
filter.addEventListener("input", sift);
setTimeout(refresh, 2000);
