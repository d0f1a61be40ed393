// Pointing at a line, label or legend row dims the others in the same figure.
for (const scope of document.querySelectorAll("[data-scope]")) {
  const keyed = [...scope.querySelectorAll("[data-key]")];
  const light = (key) => keyed.forEach((e) => e.classList.toggle("dim", key !== null && e.dataset.key !== key));
  scope.addEventListener("pointerover", (event) => light(event.target.closest("[data-key]")?.dataset.key ?? null));
  scope.addEventListener("pointerleave", () => light(null));
}
