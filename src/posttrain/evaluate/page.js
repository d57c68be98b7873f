(() => {
  const tasks = [...document.querySelectorAll(".task")];
  const buttons = [...document.querySelectorAll(".filter button")];
  const search = document.querySelector(".filter input");
  if (!search) return;
  let show = "all";
  const apply = () => {
    const words = search.value.toLowerCase();
    let seen = 0;
    for (const task of tasks) {
      const fits = show === "all" || task.dataset.verdicts.split(" ").includes(show);
      task.hidden = !(fits && (!words || task.textContent.toLowerCase().includes(words)));
      seen += !task.hidden;
    }
    document.querySelector(".empty").hidden = seen > 0;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      show = button.dataset.show;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  search.addEventListener("input", apply);
})();
