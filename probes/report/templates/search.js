// Finds a layer, an expert or a token; opens what is folded before the page is printed.
(function () {
  const runs = JSON.parse(document.getElementById('index').textContent);
  const box = document.getElementById('search'), out = document.getElementById('found');
  const add = (parent, tag, text) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const table = (parent, head, rows) => {
    const wide = add(parent, 'div'), made = add(wide, 'table');
    wide.className = 'wide';
    const line = (cells, tag) => {
      const row = add(made, 'tr');
      cells.forEach((cell, at) => { add(row, tag, cell).className = at ? 'number' : ''; });
    };
    line(head, 'th');
    rows.forEach((cells) => line(cells, 'td'));
  };
  const shown = (value) => (value === undefined ? '' : String(value));
  const heading = (run, text) => add(out, 'h3', runs.length > 1 ? run.name + ': ' + text : text);
  const ranked = (load) => load.map((value, expert) => [expert, value]).sort((a, b) => b[1] - a[1]);

  function layer(number) {
    runs.filter((run) => run.quantities[number] || run.load[number]).forEach((run) => {
      heading(run, 'layer ' + number);
      const load = run.load[number];
      if (load) {
        const order = ranked(load), some = order.slice(0, 4).map(([e, v]) => e + ' (' + v + ')').join(', ');
        add(out, 'p', 'Busiest experts, by their load over an even share: ' + some + '; idlest: ' +
          order.slice(-4).reverse().map(([e, v]) => e + ' (' + v + ')').join(', ') + '.');
      }
      table(out, ['quantity', 'layer ' + number], Object.entries(run.quantities[number] || {}).map(([k, v]) => [k, shown(v)]));
    });
  }
  function expert(number, only) {
    runs.forEach((run) => {
      const rows = Object.entries(run.load)
        .filter(([at, load]) => number < load.length && (only === undefined || Number(at) === only))
        .map(([at, load]) => [at, shown(load[number]), 1 + ranked(load).findIndex(([e]) => e === number) + ' of ' + load.length]);
      if (!rows.length) return;
      heading(run, 'expert ' + number);
      table(out, ['layer', 'load over an even share', 'place'], rows);
    });
  }
  function token(text) {
    const wanted = text.toLowerCase();
    const found = [...document.querySelectorAll('.coloured span, .own code')]
      .filter((span) => span.textContent.trim().toLowerCase() === wanted);
    const chosen = {};
    found.forEach((span) => {
      span.classList.add('hit');
      for (let at = span.closest('details'); at; at = at.parentElement.closest('details')) at.open = true;
      const title = span.title.replace('experts ', '');
      const part = span.closest('details').querySelector('summary').firstChild.textContent.trim();
      if (title) { (chosen[part] = chosen[part] || {})[title] = (chosen[part][title] || 0) + 1; }
    });
    if (!found.length) return;
    add(out, 'h3', 'token ' + text);
    const first = add(add(out, 'p', found.length + ' places on this page are marked; '), 'a', 'go to the first');
    first.href = '#hit';
    first.onclick = (event) => { event.preventDefault(); found[0].scrollIntoView({block: 'center'}); };
    table(out, ['where', 'experts chosen, and how often'], Object.entries(chosen).map(([part, by]) =>
      [part, Object.entries(by).sort((a, b) => b[1] - a[1]).slice(0, 6).map(([e, n]) => e + ' (' + n + ')').join('; ')]));
  }
  function probes(text) {
    [...document.querySelectorAll('[data-probe]')].filter((e) => e.dataset.probe.includes(text)).forEach((e) => {
      add(add(out, 'p'), 'a', 'probe ' + e.dataset.probe).href = '#' + e.id;
    });
  }
  function look() {
    const text = box.value.trim();
    out.replaceChildren();
    document.querySelectorAll('.hit').forEach((span) => span.classList.remove('hit'));
    if (!text) return;
    const at = /(?:layer|\bl)\s*(\d+)/i.exec(text), which = /(?:expert|\be)\s*(\d+)/i.exec(text);
    if (which) expert(Number(which[1]), at ? Number(at[1]) : undefined);
    else if (at) layer(Number(at[1]));
    token(text);
    if (text.length > 2) probes(text.toLowerCase());
    if (!out.children.length) add(out, 'p', 'Nothing: try "layer 3", "expert 12", "layer 3 expert 12", a token or a probe.');
  }
  box.addEventListener('input', look);
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach((part) => { part.open = true; }));
  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    for (let part = target && target.closest('details'); part; part = part.parentElement.closest('details')) part.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener('hashchange', open);
  open();
})();
