//! The page of a report in a real browser: the one that TIESMITH_BROWSER names, else a Chromium on PATH, if there is one.
//!
//! The page is shown in frames as wide as a phone and as a desk, and worked with from outside: it must load without an error,
//! not be wider than its frame, sort, search, explain and change its colours.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Spec, text};
use crate::support::run::tiesmith;

/// Works with the page in `frame`; what it finds is in the last element of the document.
const SCRIPT: &str = r#"
const found = [];
const work = (frame, width) => new Promise((done) => {
  frame.onload = () => setTimeout(() => {
    const win = frame.contentWindow, doc = win.document, root = doc.documentElement;
    const first = (table) => [...table.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
    const table = doc.querySelector("[data-table=tensors]");
    const heads = table.querySelectorAll("th button");
    const all = first(table).length;
    heads[1].click();
    const sizes = [...table.querySelectorAll("tbody tr")].map((row) => +row.cells[1].textContent.replaceAll(",", ""));
    heads[0].click();
    const names = first(table);
    const search = table.querySelector("input");
    search.value = "layers.1.";
    search.dispatchEvent(new win.Event("input"));
    const searched = first(table);
    const colours = ["light", "dark"].map((theme) => {
      while (doc.getElementById("theme").value !== theme) doc.getElementById("theme").click();
      return win.getComputedStyle(doc.body).backgroundColor;
    });
    const mark = doc.querySelector("figure svg [data-tip]");
    mark.dispatchEvent(new win.PointerEvent("pointermove", { bubbles: true, clientX: 50, clientY: 50 }));
    const tip = doc.getElementById("tip");
    found.push({
      width, inner: win.innerWidth, scroll: root.scrollWidth, errors: win.errors, all, sizes, names, searched, colours,
      tip: tip.hidden ? "" : tip.textContent, figures: doc.querySelectorAll("figure svg").length,
      wide: [...doc.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg")
        && e.getBoundingClientRect().right > width + 0.5).map((e) => e.tagName + "." + e.className).slice(0, 5),
    });
    done();
  }, 50);
});
(async () => {
  for (const width of [360, 1440]) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:800px;border:0`;
    const worked = work(frame, width);
    frame.srcdoc = page;
    document.body.append(frame);
    await worked;
    frame.remove();
  }
  const result = document.createElement("script");
  result.type = "application/json";
  result.textContent = JSON.stringify(found).replaceAll("<", "\\u003c");
  document.body.replaceChildren(result);
})();
"#;

/// Names of programs that are a Chromium.
const CHROMIUM: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
/// What a page may take to be worked with.
const PATIENCE: Duration = Duration::from_secs(120);

/// The browser, and whether it was asked for.
fn browser() -> Option<(PathBuf, bool)> {
    if let Some(asked) = std::env::var_os("TIESMITH_BROWSER") {
        return Some((asked.into(), true));
    }
    let path = std::env::var_os("PATH")?;
    let found = CHROMIUM.iter().flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)));
    found.into_iter().find(|program| program.is_file()).map(|program| (program, false))
}

/// What is in the document `host` when its script is through; none if the browser does not run here.
fn dump(browser: &Path, host: &Path) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args(["--window-size=1600,1000", "--virtual-time-budget=20000"])
        .arg(format!("--user-data-dir={}", text(profile.path())))
        .args(["--dump-dom", &text(host)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut stdout = child.stdout.take().expect("it is a pipe");
    let reader = std::thread::spawn(move || {
        let mut dom = Vec::new();
        stdout.read_to_end(&mut dom).map(|_| String::from_utf8_lossy(&dom).into_owned())
    });
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    reader.join().unwrap().ok()
}

/// Whether the browser shows anything here.
fn runs(browser: &Path) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host.html");
    fs::write(&host, "<!doctype html><body><script>document.body.append(6 * 7)</script>").unwrap();
    dump(browser, &host).is_some_and(|dom| dom.contains("42</body>"))
}

#[test]
fn the_page_works_in_a_browser() {
    let Some((browser, asked)) = browser() else {
        eprintln!("skipped: there is no Chromium on PATH, and TIESMITH_BROWSER names none");
        return;
    };
    // One that nobody asked for may be unable to run here.
    if !asked && !runs(&browser) {
        eprintln!("skipped: {} does not run here", browser.display());
        return;
    }
    let shapes = vec![
        ("embed.weight", vec![16, 9]),
        ("layers.0.mlp.weight", vec![37, 11]),
        ("layers.1.a.rather.long.name.that.goes.on.and.on.until.it.does.not.fit.weight", vec![7, 5]),
        ("layers.1.norm.weight", vec![13]),
        ("layers.10.mlp.weight", vec![9, 4]),
    ];
    let saved = Spec { shapes, models: vec![Dtype::F32; 9], ..Spec::default() }.family().save();
    let out = saved.path("report");
    let mut args = vec!["analyze".to_owned(), "--base".into(), text(&saved.base), "--out".into(), text(&out)];
    args.extend(saved.models.iter().flat_map(|model| ["--model".into(), text(model)]));
    tiesmith(args).succeeded();
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for remote in ["http:", "https:", "@import", "url("] {
        assert!(!page.contains(remote), "the page asks for {remote}");
    }
    let spy = "<head><script>window.errors=[];addEventListener('error',(e)=>errors.push(e.message))</script>";
    let page = serde_json::to_string(&page.replacen("<head>", spy, 1)).unwrap().replace('<', "\\u003c");
    let host = saved.path("host.html");
    fs::write(&host, format!("<!doctype html><body><script>const page = {page};{SCRIPT}</script>")).unwrap();
    let dom = dump(&browser, &host).expect("the browser runs");
    let found = dom.split("application/json\">").last().unwrap().split("</script>").next().unwrap();
    let found: Vec<Value> = serde_json::from_str(found).unwrap_or_else(|e| panic!("{e}: {dom}"));
    assert_eq!(found.len(), 2);
    for seen in found {
        assert_eq!(seen["errors"], serde_json::json!([]), "{seen}");
        assert_eq!(seen["inner"], seen["width"], "{seen}");
        // A bar to scroll with may take room beside it.
        assert!(seen["scroll"].as_u64() <= seen["width"].as_u64(), "{seen}");
        assert_eq!(seen["wide"], serde_json::json!([]), "{seen}");
        assert_eq!((seen["all"].as_u64(), seen["figures"].as_u64()), (Some(5), Some(11)));
        let sizes: Vec<u64> = serde_json::from_value(seen["sizes"].clone()).unwrap();
        assert_eq!(sizes, [407, 144, 36, 35, 13]);
        // Numbers in names count as numbers.
        assert_eq!(seen["names"][0], "embed.weight");
        assert_eq!(seen["names"][4], "layers.10.mlp.weight");
        assert_eq!(seen["searched"].as_array().unwrap().len(), 2, "{seen}");
        assert_ne!(seen["colours"][0], seen["colours"][1], "{seen}");
        assert!(seen["tip"].as_str().is_some_and(|tip| !tip.is_empty()), "{seen}");
    }
}
