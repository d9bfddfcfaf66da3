// Choosing photos: a field each, with previews. The files stay in the browser until a click sends their bytes.
(() => {
  const chosen = {}; // files, by the name of the field
  const kinds = "image/jpeg,image/png,image/webp,image/bmp,image/gif,image/tiff,image/jp2"; // iPhones turn HEIC into JPEG

  function draw(field) {
    const files = chosen[field.dataset.name];
    const list = field.querySelector("ul");
    for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    list.replaceChildren(
      ...files.map((file) => {
        const item = document.createElement("li");
        const image = document.createElement("img");
        const name = document.createElement("span");
        image.alt = "";
        image.addEventListener("error", () => item.classList.add("af-broken"));
        image.src = URL.createObjectURL(file);
        name.textContent = file.name;
        item.append(image, name);
        return item;
      }),
    );
    field.classList.toggle("af-chosen", files.length > 0);
  }

  function take(field, files) {
    const several = field.querySelector("input").multiple;
    chosen[field.dataset.name] = several ? [...files] : [...files].slice(0, 1);
    draw(field);
  }

  function start(element) {
    const field = element.querySelector(".af-picker");
    if (field.dataset.started) return;
    field.dataset.started = "yes";
    chosen[field.dataset.name] = [];
    const input = field.querySelector("input");
    input.accept = kinds;
    input.addEventListener("change", () => {
      if (input.files.length) take(field, input.files);
      input.value = ""; // so that the same file can be chosen again
    });
    field.querySelector("button").addEventListener("click", (event) => {
      event.preventDefault();
      take(field, []);
    });
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      field.addEventListener(kind, (event) => {
        event.preventDefault();
        event.stopPropagation();
        field.classList.toggle("af-over", kind === "dragenter" || kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files.length) take(field, event.dataTransfer.files);
      });
    }
  }

  function base64(file) {
    return new Promise((resolve) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.onerror = () => resolve(null);
      reader.readAsDataURL(file);
    });
  }

  // What photos.py reads. A file that is too large is named, not sent.
  async function photos(name, mostBytes) {
    const files = chosen[name] || [];
    const whole = await Promise.all(
      files.map(async (file) => ({
        name: file.name,
        size: file.size,
        data: file.size === 0 ? "" : file.size > mostBytes ? null : await base64(file),
      })),
    );
    return JSON.stringify(whole);
  }

  function clear(name) {
    const field = document.querySelector(`.af-picker[data-name="${name}"]`);
    if (field) take(field, []);
  }

  window.adaptface = { start, photos, clear };
})();
