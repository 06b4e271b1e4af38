// Sets the formulas of a page, which pymdownx.arithmatex leaves as \(...\) and \[...\].
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const display = element.tagName === "DIV";
    const text = element.textContent.trim().slice(2, -2);
    katex.render(text, element, { displayMode: display, throwOnError: false });
  }
});
