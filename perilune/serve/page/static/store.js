// Conversations and settings, kept in this browser and nowhere else. The API key is forgotten with the tab.
"use strict";

const Store = (() => {
  const CHATS = "perilune.chats";
  const SETTINGS = "perilune.settings";
  const KEY = "perilune.key";
  const MOST = 100;

  function read(name, fallback) {
    try {
      const found = JSON.parse(localStorage.getItem(name));
      return found && typeof found === typeof fallback && Array.isArray(found) === Array.isArray(fallback) ? found : fallback;
    } catch {
      return fallback;
    }
  }

  function isChat(chat) {
    return chat && typeof chat.id === "string" && typeof chat.title === "string" && Array.isArray(chat.messages)
      && chat.messages.every((one) => one && typeof one.content === "string" && ["user", "assistant"].includes(one.role));
  }

  const chats = () => read(CHATS, []).filter(isChat);

  // The newest first; where there is no room the oldest give way.
  function saveChat(chat) {
    let kept = [chat, ...chats().filter((one) => one.id !== chat.id)].slice(0, MOST);
    while (kept.length) {
      try {
        localStorage.setItem(CHATS, JSON.stringify(kept));
        return true;
      } catch {
        kept = kept.slice(0, -1);
      }
    }
    return false;
  }

  function removeChat(id) {
    localStorage.setItem(CHATS, JSON.stringify(chats().filter((one) => one.id !== id)));
  }

  const settings = () => read(SETTINGS, {});
  function saveSettings(values) {
    try {
      localStorage.setItem(SETTINGS, JSON.stringify(values));
    } catch {
      // They hold until the page is left.
    }
  }

  const key = () => sessionStorage.getItem(KEY) || "";
  const saveKey = (value) => sessionStorage.setItem(KEY, value);

  return { chats, saveChat, removeChat, settings, saveSettings, key, saveKey };
})();
