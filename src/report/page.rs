//! The page: one file that needs nothing but itself, light and dark, on a phone and on a desk.
//!
//! - Figures stand in the page as SVG; tables are made by the script from lists in the page, sorted and searched there.
//! - Size is bounded: the page lists the [`ROWS`] largest tensors; `report.json` has them all.

use serde_json::{Value, json};

use super::data::{Analysis, Group, Line, Row};
use super::figures::{chosen_density, figures};
use super::svg::{escape, percent};
use super::words::{grouped, remarks};

/// Name of the page's file.
pub const PAGE: &str = "report.html";
/// Most tensors that the page lists, and most layers and kinds.
const ROWS: usize = 6_000;
const GROUPS: usize = 400;
/// Most models with a row of their own.
const MODELS: usize = 128;

const HEAD: &str = include_str!("head.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page as text.
pub fn page(analysis: &Analysis, rows: &[Row]) -> String {
    let mut out = String::with_capacity(1 << 20);
    out.push_str(HEAD);
    out.push_str(&format!("<title>Interference: {}</title>\n", escape(&analysis.base)));
    out.push_str(&format!("<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"));
    head(&mut out, analysis);
    summary(&mut out, analysis);
    section(
        &mut out,
        "models",
        "Models",
        "Kept and surviving entries at the chosen density; bars run to the largest of a column.",
    );
    drawings(&mut out, analysis);
    section(
        &mut out,
        "layers",
        "Layers",
        "Shades run from nothing to the largest value of a column. Click a heading to sort.",
    );
    section(&mut out, "kinds", "Kinds of tensors", "Names with the numbers left out: what all layers have in common.");
    let listed = rows.len().min(ROWS);
    let note = match listed == rows.len() {
        true => format!("All {} tensors.", grouped(listed as u64)),
        false => format!(
            "The {} largest of {} tensors; report.json has them all.",
            grouped(listed as u64),
            grouped(rows.len() as u64)
        ),
    };
    section(&mut out, "tensors", "Tensors", &note);
    foot(&mut out, analysis);
    out.push_str("</main>\n<div id=\"tip\" role=\"tooltip\" hidden></div>\n");
    out.push_str(&format!("<script type=\"application/json\" id=\"data\">{}</script>\n", data(analysis, rows)));
    out.push_str(&format!("<script>\n{SCRIPT}</script>\n</body>\n</html>\n"));
    out
}

fn head(out: &mut String, analysis: &Analysis) {
    let count = analysis.models.len();
    let plural = if count == 1 { "fine-tune" } else { "fine-tunes" };
    out.push_str("<header>\n<p class=\"kicker\">Interference report</p>\n<button id=\"theme\" type=\"button\" ");
    out.push_str("title=\"light, dark, or as the system\" aria-label=\"colour theme\">theme</button>\n");
    out.push_str(&format!("<h1>{count} {plural} of <em>{}</em></h1>\n", escape(&analysis.base)));
    let scope = match analysis.settings.scope.as_str() {
        "model" => "one threshold per task vector",
        _ => "one threshold per tensor",
    };
    out.push_str(&format!(
        "<p class=\"lead\">What each model changed, where the changes disagree, and what a TIES merge would hold of them. \
         Trimmed to {}, {scope}.</p>\n</header>\n",
        escape(&chosen_density(analysis))
    ));
}

fn tile(out: &mut String, value: &str, label: &str) {
    out.push_str(&format!("<div class=\"tile\"><b>{}</b><span>{}</span></div>\n", escape(value), escape(label)));
}

fn summary(out: &mut String, analysis: &Analysis) {
    out.push_str("<section id=\"summary\">\n<div class=\"tiles\">\n");
    tile(out, &grouped(analysis.overall.elements), "parameters");
    let line = Line::of(&analysis.overall, analysis.settings.chosen);
    if analysis.models.len() > 1 {
        tile(out, &line.conflicts.map_or("–".into(), percent), "in conflict after the trim");
        tile(out, &analysis.chance_of_conflict().map_or("–".into(), percent), "if signs were drawn");
        tile(out, &line.survives.map_or("–".into(), percent), "of what is kept survives");
    }
    tile(out, &line.kept.map_or("–".into(), percent), "of entries kept");
    tile(out, &line.zeros.map_or("–".into(), percent), "never changed");
    out.push_str("</div>\n<dl>\n");
    for remark in remarks(analysis) {
        out.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", escape(remark.about), escape(&remark.text)));
    }
    out.push_str("</dl>\n");
    for warning in &analysis.warnings {
        out.push_str(&format!("<p class=\"warning\">{}</p>\n", escape(warning)));
    }
    out.push_str("</section>\n");
}

fn drawings(out: &mut String, analysis: &Analysis) {
    out.push_str("<section>\n<h2>Figures</h2>\n");
    if analysis.models.len() < 2 {
        out.push_str(
            "<p class=\"note\">With a single model, figures that compare models are left out: they need two.</p>\n",
        );
    }
    out.push_str("<div class=\"figures\">\n");
    // The map of layers is a table of its own further down.
    for figure in figures(analysis).iter().filter(|figure| figure.name != "layers") {
        let paper = figure.paper.map_or_else(String::new, |paper| format!("<small>{}</small>", escape(paper)));
        out.push_str(&format!(
            "<figure id=\"{}\"><h3>{}{paper}</h3>\n{}\n<figcaption>{}</figcaption></figure>\n",
            figure.name,
            escape(figure.title),
            figure.inline(),
            escape(&figure.caption)
        ));
    }
    out.push_str("</div>\n</section>\n");
}

/// A section with a table that the script fills.
fn section(out: &mut String, id: &str, title: &str, note: &str) {
    out.push_str(&format!(
        "<section id=\"{id}\">\n<h2>{title}</h2>\n<p class=\"note\">{}</p>\n<div class=\"table\" data-table=\"{id}\"></div>\n\
         <noscript><p class=\"note\">Tables need JavaScript; every number is in report.json.</p></noscript>\n</section>\n",
        escape(note)
    ));
}

fn foot(out: &mut String, analysis: &Analysis) {
    let list: Vec<String> = analysis.settings.densities.iter().flatten().map(|&k| percent(k)).collect();
    out.push_str(&format!(
        "<footer><p>Made with {}. Densities looked at: {}. Task vectors are differences to the base; a conflict is a parameter \
         that survives the trim with a positive sign in one model and a negative one in another. All numbers, and what they \
         mean exactly: <code>report.json</code> and the documentation. The method: Yadav et al. 2023, arXiv 2306.01708.</p>\n\
         <p class=\"print\">{}</p></footer>\n",
        escape(&analysis.program),
        escape(&list.join(", ")),
        escape(&analysis.fingerprint)
    ));
}

/// Six significant digits, or null.
fn digits(value: Option<f64>) -> Value {
    value.map_or(Value::Null, |value| json!(format!("{value:.5e}").parse::<f64>().unwrap_or(value)))
}

fn line(name: &str, line: &Line) -> Vec<Value> {
    let mut row = vec![json!(crate::error::printable(name)), json!(line.elements)];
    row.extend([line.kept, line.conflicts, line.cosine, line.survives, line.norm_share, line.zeros].map(digits));
    row
}

/// The lists that the script makes tables of, safe to stand in a script element.
fn data(analysis: &Analysis, rows: &[Row]) -> String {
    let chosen = analysis.settings.chosen;
    let groups = |groups: &[Group]| {
        let one = |group: &Group| {
            let mut row = line(&group.name, &Line::of(&group.measured, chosen));
            row.insert(1, json!(group.tensors));
            Value::from(row)
        };
        groups.iter().take(GROUPS).map(one).collect::<Vec<_>>()
    };
    let mut listed: Vec<&Row> = rows.iter().collect();
    if listed.len() > ROWS {
        listed.sort_by_key(|row| std::cmp::Reverse(row.line.elements));
        listed.truncate(ROWS);
    }
    let tensors: Vec<Value> = listed.iter().map(|row| line(&row.name, &row.line).into()).collect();
    let overall = &analysis.overall;
    let model = |m: usize| {
        let at = &overall.densities[chosen];
        let zeros = super::data::share(overall.zeros[m], overall.present[m]);
        let survival = overall.survival[m];
        let numbers = [
            Some(overall.norm[m]),
            overall.mean_magnitude[m],
            zeros,
            at.kept_fraction[m],
            at.tied_fraction[m],
            at.norm_kept[m],
            survival.of_kept,
            survival.of_mass,
            survival.cosine,
        ];
        let name = [json!(crate::error::printable(&analysis.models[m]))];
        name.into_iter().chain(numbers.map(digits)).collect::<Vec<_>>()
    };
    let models: Vec<Vec<Value>> = (0..analysis.models.len().min(MODELS)).map(model).collect();
    let two = analysis.models.len() > 1;
    let data = json!({
        "two": two,
        "models": models,
        "layers": groups(&analysis.layers),
        "kinds": groups(&analysis.kinds),
        "tensors": tensors,
    });
    // A name could hold what ends the element, or a line separator.
    data.to_string().replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}
