// Markdown to DOM nodes. Text is only ever set as text: nothing that a model writes can become an element or an
// attribute that this file does not make itself, and links go to http, https and mailto alone.
"use strict";

const Markdown = (() => {
  const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
  const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
  const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
  const QUOTE = /^ {0,3}> ?/;
  const ITEM = /^( *)([-*+]|(\d{1,9})[.)])( +|$)(.*)$/;
  const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
  const LINK = /^\[((?:[^\[\]\\]|\\.|\[[^\[\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'(][^"')]*["')])?\s*\)/;
  const BARE = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_~]/;
  const SAFE = /^(?:https?:\/\/|mailto:)/i;
  const MARKS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", "_": "em" };
  const DEEPEST = 12;
  const LONGEST = 20000; // of one paragraph with marks in it; longer ones are shown as they are

  function element(name, ...children) {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  }

  // Cut text into blocks {kind, lines, ...}; the sources of blocks that are finished never change as text is added.
  function blocks(lines) {
    const found = [];
    let at = 0;
    while (at < lines.length) {
      if (!lines[at].trim()) {
        at += 1;
        continue;
      }
      const block = fence(lines, at) || heading(lines, at) || quote(lines, at) || list(lines, at) || table(lines, at)
        || paragraph(lines, at);
      block.source = lines.slice(at, block.end).join("\n");
      found.push(block);
      at = block.end;
    }
    return found;
  }

  function fence(lines, at) {
    const open = FENCE.exec(lines[at]);
    if (!open) return null;
    const close = new RegExp(`^ {0,3}\\${open[1][0]}{${open[1].length},}[ \\t]*$`);
    const indent = /^ */.exec(lines[at])[0].length;
    let end = at + 1;
    while (end < lines.length && !close.test(lines[end])) end += 1;
    const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, /^ */.exec(line)[0].length)));
    return { kind: "code", language: open[2], text: body.join("\n"), end: Math.min(end + 1, lines.length) };
  }

  function heading(lines, at) {
    if (RULE.test(lines[at])) return { kind: "rule", end: at + 1 };
    const found = HEADING.exec(lines[at]);
    return found && { kind: "heading", level: found[1].length, text: found[2] || "", end: at + 1 };
  }

  function quote(lines, at) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return end > at && { kind: "quote", inner: lines.slice(at, end).map((line) => line.replace(QUOTE, "")), end };
  }

  function list(lines, at) {
    const first = ITEM.exec(lines[at]);
    if (!first || first[1].length > 3) return null;
    const isOrdered = first[3] !== undefined;
    const items = [];
    let end = at;
    let inner = 0;
    while (end < lines.length) {
      const line = lines[end];
      const item = ITEM.exec(line);
      const indent = /^ */.exec(line)[0].length;
      if (!line.trim()) {
        // A blank line is part of the list if what follows is.
        const next = lines.slice(end + 1).find((one) => one.trim());
        if (next === undefined || (/^ */.exec(next)[0].length < inner && !sameList(next, isOrdered, first[1].length))) break;
        items.at(-1).push("");
      } else if (items.length && indent >= inner) {
        items.at(-1).push(line.slice(inner));
      } else if (item && sameList(line, isOrdered, first[1].length) && !RULE.test(line)) {
        inner = item[1].length + item[2].length + (item[4].length > 4 ? 1 : Math.max(item[4].length, 1));
        items.push([item[5]]);
      } else if (items.length && lines[end - 1].trim() && !startsBlock(lines, end)) {
        items.at(-1).push(line.trimStart());
      } else break;
      end += 1;
    }
    return items.length ? { kind: "list", isOrdered, start: Number(first[3] || 1), items, end } : null;
  }

  function sameList(line, isOrdered, indent) {
    const item = ITEM.exec(line);
    return item && (item[3] !== undefined) === isOrdered && item[1].length <= indent + 3;
  }

  function table(lines, at) {
    if (at + 1 >= lines.length || !lines[at].includes("|") || !DIVIDER.test(lines[at + 1])) return null;
    const head = cells(lines[at]);
    const aligns = cells(lines[at + 1]).map((cell) => [cell.startsWith(":"), cell.endsWith(":")]);
    if (head.length !== aligns.length) return null;
    let end = at + 2;
    while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
    return { kind: "table", head, aligns, rows: lines.slice(at + 2, end).map(cells), end };
  }

  function cells(line) {
    const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  }

  function startsBlock(lines, at) {
    const line = lines[at];
    return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
  }

  function paragraph(lines, at) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !startsBlock(lines, end) && !table(lines, end)) end += 1;
    return { kind: "text", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
  }

  function render(block, depth) {
    switch (block.kind) {
      case "rule": return element("hr");
      case "heading": return element(`h${block.level}`, ...inline(block.text, depth));
      case "quote": return element("blockquote", ...nested(block.inner, depth));
      case "code": return code(block);
      case "list": return renderList(block, depth);
      case "table": return renderTable(block, depth);
      default: return element("p", ...inline(block.text, depth));
    }
  }

  function nested(lines, depth) {
    if (depth >= DEEPEST) return [lines.join("\n")];
    return blocks(lines).map((block) => render(block, depth + 1));
  }

  function renderList(block, depth) {
    const made = element(block.isOrdered ? "ol" : "ul");
    if (block.isOrdered && block.start !== 1) made.start = block.start;
    for (const lines of block.items) {
      const isLoose = lines.slice(0, -1).some((line) => !line.trim());
      const children = nested(lines, depth);
      // The one paragraph of a tight item needs no space around it.
      const flat = children.flatMap((child) => (!isLoose && child.tagName === "P" ? [...child.childNodes] : [child]));
      made.append(element("li", ...flat));
    }
    return made;
  }

  function renderTable(block, depth) {
    const row = (name, texts) => element("tr", ...block.aligns.map(([left, right], column) => {
      const cell = element(name, ...inline(texts[column] || "", depth));
      if (right) cell.className = left ? "center" : "right";
      return cell;
    }));
    const body = element("tbody", ...block.rows.map((texts) => row("td", texts)));
    const made = element("div", element("table", element("thead", row("th", block.head)), body));
    made.className = "table";
    return made;
  }

  function code(block) {
    const copy = element("button", "Copy");
    copy.type = "button";
    copy.className = "copy";
    const label = element("span", block.language.slice(0, 30) || "text");
    const bar = element("div", label, copy);
    bar.className = "bar";
    const made = element("div", bar, element("pre", element("code", block.text)));
    made.className = "code";
    return made;
  }

  function inline(text, depth) {
    if (depth >= DEEPEST || text.length > LONGEST) return [text];
    const nodes = [];
    let plain = "";
    const push = (node) => {
      if (plain) nodes.push(plain);
      plain = "";
      nodes.push(node);
    };
    let at = 0;
    while (at < text.length) {
      const found = special(text, at, depth);
      if (found) {
        push(found.node);
        at = found.end;
      } else {
        const escaped = text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] || "");
        plain += escaped ? text[at + 1] : text[at];
        at += escaped ? 2 : 1;
      }
    }
    if (plain) nodes.push(plain);
    return nodes;
  }

  function special(text, at, depth) {
    switch (text[at]) {
      case "\n": return { node: element("br"), end: at + 1 };
      case "`": return codeSpan(text, at);
      case "!": return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
      case "[": return link(text, at, depth);
      case "h": return at && /\w/.test(text[at - 1]) ? null : bare(text, at);
      case "*": case "_": case "~": return marked(text, at, depth);
      default: return null;
    }
  }

  function codeSpan(text, at) {
    const ticks = /^`+/.exec(text.slice(at))[0];
    let end = text.indexOf(ticks, at + ticks.length);
    while (end >= 0 && (text[end + ticks.length] === "`" || text[end - 1] === "`")) {
      end = text.indexOf(ticks, end + 1);
    }
    if (end < 0) return null;
    const inner = text.slice(at + ticks.length, end).replaceAll("\n", " ");
    const shown = inner.trim() && /^ .* $/.test(inner) ? inner.slice(1, -1) : inner;
    return { node: element("code", shown), end: end + ticks.length };
  }

  function link(text, at, depth) {
    const found = LINK.exec(text.slice(at, at + 4000));
    if (!found || !SAFE.test(found[2])) return null;
    return { node: anchor(found[2], inline(found[1], depth + 1)), end: at + found[0].length };
  }

  function bare(text, at) {
    const found = BARE.exec(text.slice(at, at + 2000));
    return found && { node: anchor(found[0], [found[0]]), end: at + found[0].length };
  }

  function anchor(href, children) {
    const made = element("a", ...children);
    made.href = href;
    made.target = "_blank";
    made.rel = "noopener noreferrer nofollow";
    return made;
  }

  function marked(text, at, depth) {
    const double = text.slice(at, at + 2);
    const mark = double in MARKS ? double : text[at];
    if (!(mark in MARKS)) return null;
    const start = at + mark.length;
    if (/\s/.test(text[start] || " ")) return null;
    if (mark[0] === "_" && /\w/.test(text[at - 1] || "")) return null;
    for (let end = text.indexOf(mark, start); end >= 0; end = text.indexOf(mark, end + 1)) {
      const after = text[end + mark.length] || "";
      if (end === start || /[\s\\]/.test(text[end - 1])) continue;
      if (mark.length === 1 && (after === mark || text[end - 1] === mark)) continue;
      if (mark[0] === "_" && /\w/.test(after)) continue;
      return { node: element(MARKS[mark], ...inline(text.slice(start, end), depth + 1)), end: end + mark.length };
    }
    return null;
  }

  // Bring what `target` shows up to date; blocks that are as they were keep their nodes.
  function update(target, text) {
    const wanted = blocks(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"));
    const shown = target.shownBlocks || [];
    let same = 0;
    while (same < wanted.length && same < shown.length && shown[same] === wanted[same].source) same += 1;
    while (target.childNodes.length > same) target.lastChild.remove();
    for (const block of wanted.slice(same)) target.append(render(block, 0));
    target.shownBlocks = wanted.map((block) => block.source);
  }

  return { update };
})();
