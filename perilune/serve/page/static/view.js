// What a conversation looks like.
"use strict";

const View = (() => {
  const log = document.getElementById("log");

  function make(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function button(text, action, act) {
    const made = make("button", action, text);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  }

  // Draw a message anew; returns {update, end} for one that is being written.
  function message(entry, acts) {
    const box = make("article", `message ${entry.role}`);
    box.setAttribute("aria-label", entry.role === "user" ? "You" : "Model");
    if (entry.role === "user") {
      box.append(make("div", "text", entry.content));
      box.append(actions(entry, acts));
      log.append(box);
      return box;
    }
    const thoughts = make("details", "thoughts");
    thoughts.append(make("summary", "", "Thoughts"), make("div", "text"));
    const text = make("div", "text markdown");
    const note = make("p", "note");
    box.append(thoughts, text, note);
    log.append(box);
    box.show = () => show(box, entry, { thoughts, text, note });
    box.finish = () => {
      box.classList.remove("writing");
      box.show();
      box.append(actions(entry, acts));
    };
    if (acts.isWriting) {
      box.classList.add("writing");
      box.show();
    } else box.finish();
    return box;
  }

  function show(box, entry, { thoughts, text, note }) {
    const isWriting = box.classList.contains("writing");
    thoughts.hidden = !entry.reasoning;
    thoughts.lastChild.textContent = entry.reasoning || "";
    thoughts.firstChild.textContent = isWriting && !entry.content ? "Thinking…" : "Thoughts";
    Markdown.update(text, entry.content);
    box.classList.toggle("waiting", isWriting && !entry.content && !entry.reasoning);
    note.textContent = entry.error || entry.note || "";
    note.classList.toggle("error", Boolean(entry.error));
    if (entry.error) note.setAttribute("role", "alert");
    note.hidden = !note.textContent;
  }

  function actions(entry, acts) {
    const bar = make("div", "actions");
    if (entry.content) bar.append(button("Copy", "copy-message", (event) => copy(event.target, entry.content)));
    if (entry.role === "assistant") bar.append(button("Try again", "retry", () => acts.retry(entry)));
    else bar.append(button("Edit", "edit", () => acts.edit(entry)));
    return bar;
  }

  async function copy(target, text) {
    try {
      await navigator.clipboard.writeText(text);
      target.textContent = "Copied";
    } catch {
      target.textContent = "Not allowed";
    }
    setTimeout(() => { target.textContent = "Copy"; }, 1500);
  }

  log.addEventListener("click", (event) => {
    if (event.target.matches(".code .copy")) copy(event.target, event.target.closest(".code").querySelector("code").textContent);
  });

  // Follow the answer only while the reader is at its end.
  let follows = true;
  const scroller = document.getElementById("scroller");
  scroller.addEventListener("scroll", () => {
    follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  });
  function follow(isForced) {
    if (isForced) follows = true;
    if (follows) scroller.scrollTop = scroller.scrollHeight;
  }

  function clear() {
    log.replaceChildren();
  }

  return { message, clear, follow, make, button };
})();
