"use strict";
// One report is one section: its player, its tree, and the details of the candidate that is chosen.
(() => {
  document.documentElement.classList.add("scripted");
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));
  let active = null;

  class Report {
    constructor(section) {
      this.section = section;
      this.key = section.dataset.key;
      this.video = section.querySelector("video");
      this.buttons = all(section, ".ruler button");
      this.starts = this.buttons.map((button) => parseFloat(button.dataset.start));
      // Of a long search only the newest chunks are here.
      this.first = this.buttons.length ? parseInt(this.buttons[0].dataset.chunk, 10) : 0;
      this.nodes = new Map(all(section, ".node").map((node) => [node.dataset.for, node]));
      this.candidates = new Map(all(section, ".candidate").map((article) => [article.id, article]));
      this.charts = all(section, "svg.chart");
      this.chosen = null;
      for (const [id, node] of this.nodes) {
        node.addEventListener("click", (event) => { event.preventDefault(); this.choose(id, true); });
        node.addEventListener("focus", () => { active = this; });
      }
      for (const link of all(section, ".candidate a")) {
        link.addEventListener("click", (event) => { event.preventDefault(); this.choose(link.hash.slice(1), true); });
      }
      for (const button of this.buttons) {
        button.addEventListener("click", () => this.chooseShown(parseInt(button.dataset.chunk, 10)));
      }
      section.addEventListener("pointerdown", () => { active = this; });
      if (this.video) {
        const follow = () => {
          this.follow();
          if (!this.video.paused) requestAnimationFrame(follow);
        };
        for (const name of ["play", "seeked", "loadedmetadata"]) this.video.addEventListener(name, follow);
      }
      this.start();
    }

    start() {
      const named = decodeURIComponent(location.hash.slice(1));
      const first = this.section.querySelector(".candidate[data-shown]");
      if (this.candidates.has(named)) this.choose(named, false);
      else if (first) this.choose(first.id, false);
    }

    // Shows the details of a candidate; `seek` takes the player to its chunk.
    choose(id, seek) {
      const article = this.candidates.get(id);
      if (!article) return;
      active = this;
      if (this.chosen) for (const part of this.parts(this.chosen)) part.classList.remove("chosen-one");
      this.chosen = id;
      for (const part of this.parts(id)) part.classList.add("chosen-one");
      if (!seek) return;
      history.replaceState(null, "", "#" + id);
      const node = this.nodes.get(id);
      node.focus({ preventScroll: true });
      const place = node.getBoundingClientRect();
      if (place.left < 0 || place.right > innerWidth) node.scrollIntoView({ block: "nearest", inline: "center" });
      this.seek(parseInt(article.dataset.chunk, 10));
    }

    parts(id) {
      return [this.candidates.get(id), this.nodes.get(id)].filter(Boolean);
    }

    chooseShown(chunk) {
      const shown = this.section.querySelector(`.candidate[data-shown][data-chunk="${chunk}"]`);
      if (shown) this.choose(shown.id, true);
      else this.seek(chunk);
    }

    seek(chunk) {
      const start = this.starts[chunk - this.first];
      // A little later than the border, where rounding cannot show the chunk before.
      if (this.video && Number.isFinite(start)) this.video.currentTime = start + 0.001;
    }

    // The neighbour of the chosen candidate, `chunks` to the right and `numbers` below.
    move(chunks, numbers) {
      const article = this.candidates.get(this.chosen);
      if (!article) return;
      const chunk = parseInt(article.dataset.chunk, 10) + chunks;
      const number = parseInt(article.dataset.number, 10) + numbers;
      this.choose(`${this.key}c${chunk}-${number}`, true);
    }

    follow() {
      const time = this.video.currentTime;
      const last = this.starts.length - 1;
      let chunk = 0;
      while (chunk < last && this.starts[chunk + 1] <= time) chunk += 1;
      this.buttons.forEach((button, index) => button.classList.toggle("now", index === chunk));
      const end = chunk < last ? this.starts[chunk + 1] : this.video.duration;
      const part = (time - this.starts[chunk]) / (end - this.starts[chunk]);
      if (!Number.isFinite(part)) return;
      for (const chart of this.charts) {
        const line = chart.querySelector(".playhead");
        const x = parseFloat(chart.dataset.gutter) + (chunk + part) * parseFloat(chart.dataset.step);
        line.setAttribute("x1", x);
        line.setAttribute("x2", x);
        line.setAttribute("visibility", part < 0 ? "hidden" : "visible");
      }
    }
  }

  const reports = all(document, ".report").map((section) => new Report(section));
  active = reports[0] || null;

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.addEventListener("keydown", (event) => {
    const elsewhere = event.target.closest("video, input, summary");
    if (!steps[event.key] || !active || elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    active.move(...steps[event.key]);
  });

  // A video stands in the page once; the others show the same.
  for (const copy of all(document, "video[data-copy-of]")) {
    const source = document.getElementById(copy.dataset.copyOf).querySelector("video");
    if (source) copy.src = source.src;
  }
  for (const button of all(document, ".play-all")) {
    button.addEventListener("click", () => {
      const videos = all(button.closest(".comparison"), "video");
      const playing = videos.some((video) => !video.paused);
      for (const video of videos) {
        if (playing) video.pause();
        else { video.currentTime = 0; video.play(); }
      }
      button.textContent = playing ? "Play together" : "Stop";
    });
  }

  // What is folded away is printed as well.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all(document, "details:not([open])");
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of folded) part.open = false; });
})();
