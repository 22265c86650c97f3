// Draws the blocks of `mermaid`. Only pages that have one load Mermaid, which is large.
(() => {
  const blocks = document.querySelectorAll("pre > code.language-mermaid");
  if (blocks.length === 0) {
    return;
  }
  const pictures = Array.from(blocks, (block) => {
    const picture = document.createElement("div");
    picture.className = "mermaid";
    picture.textContent = block.textContent;
    block.parentElement.replaceWith(picture);
    return picture;
  });
  const script = document.createElement("script");
  script.src = path_to_root + "mermaid.min.js";
  script.onload = () => {
    const dark = ["ayu", "coal", "navy"].some((theme) =>
      document.documentElement.classList.contains(theme));
    mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "default" });
    mermaid.run({ nodes: pictures });
  };
  document.head.append(script);
})();
