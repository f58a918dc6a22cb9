//! `tiesmith methods`: the registry of methods, for people and for programs.

use std::fmt::Write;

use clap::CommandFactory;
use serde_json::{Value, json};
use tiesmith::{METHODS, Method, ParamKind, ParamSpec, Result, Statistics};

use super::args::{Cli, MethodsArgs};
use super::table::Table;
use super::{print, print_json};

/// What the columns of the list mean.
const NOTE: &str = "\
Columns: parameter, default, values, meaning.
* Each model may have its own value, given after its path: --model CKPT,weight=0.5,density=30%
";

/// Runs the command.
pub fn run(args: &MethodsArgs) -> Result<u8> {
    if args.json {
        let methods: Vec<Value> = METHODS.iter().map(|method| describe(*method)).collect();
        return print_json(&json!({ "methods": methods }));
    }
    let pages: Vec<String> = METHODS.iter().map(|method| render(*method)).collect();
    print(&format!("{}\n{NOTE}", pages.join("\n")))
}

fn describe(method: &dyn Method) -> Value {
    let params: Vec<Value> = method.params().iter().map(describe_param).collect();
    json!({
        "name": method.name(),
        "summary": method.summary(),
        "formula": method.formula(),
        "reference": method.reference(),
        "needs_base": method.needs_base(),
        "trims": method.trims(),
        "draws": method.draws(),
        "statistics": method.statistics().map(Statistics::name),
        "models": {
            "min": method.models().0,
            "max": Some(method.models().1).filter(|&most| most < usize::MAX),
        },
        "params": params,
    })
}

fn describe_param(spec: &ParamSpec) -> Value {
    let mut value = json!({ "name": spec.name, "per_model": spec.per_model, "help": spec.help });
    match spec.kind {
        ParamKind::Number { default, min, max } => {
            value["default"] = json!(default);
            value["min"] = json!(Some(min).filter(|&min| min > f64::from(f32::MIN)));
            value["max"] = json!(Some(max).filter(|&max| max < f64::from(f32::MAX)));
        }
        ParamKind::Choice(words) => {
            value["default"] = json!(words[0]);
            value["choices"] = json!(words);
        }
    }
    value
}

fn render(method: &dyn Method) -> String {
    let mut text = format!("{}: {}\n", method.name(), method.summary());
    let _ = writeln!(text, "  {}\n  {}", method.formula(), method.reference());
    let base = if method.needs_base() { "needs --base" } else { "needs no base" };
    let trims = match (method.trims(), method.draws()) {
        (true, false) => "; trims: --scope, --threshold and --trim-ties apply",
        (_, true) => "; draws at random: --seed applies",
        _ => "",
    };
    let models = match method.models() {
        (1, usize::MAX) => String::new(),
        (fewest, usize::MAX) => format!("; {fewest} models or more"),
        (1, 1) => "; one model".into(),
        (fewest, most) if fewest == most => format!("; {most} models"),
        (fewest, most) => format!("; {fewest} to {most} models"),
    };
    let statistics = match method.statistics() {
        Some(kind) => format!("; needs --{} of each model", kind.name()),
        None => String::new(),
    };
    let _ = writeln!(text, "  {base}{models}{trims}{statistics}");
    let mut table = Table::new("    ", "llll");
    for spec in method.params() {
        let (default, values) = values(spec.kind);
        table.row([spelling(spec), default, values, spec.help.to_string()]);
    }
    text.push_str(&table.render());
    text
}

/// How the parameter is given: as an option, after a model (`*`), or both. What has no option of its own is given by
/// `--param`.
fn spelling(spec: &ParamSpec) -> String {
    let cli = Cli::command();
    let merge = cli.find_subcommand("merge");
    let option = merge.and_then(|merge| merge.get_arguments().find(|argument| argument.get_id() == spec.name));
    let long = option.and_then(|argument| argument.get_long());
    match (long, spec.per_model) {
        (Some(long), true) => format!("--{long} *"),
        (Some(long), false) => format!("--{long}"),
        (None, true) => format!("{} *", spec.name),
        (None, false) => format!("--param {}=", spec.name),
    }
}

/// Default and accepted values.
fn values(kind: ParamKind) -> (String, String) {
    match kind {
        ParamKind::Choice(words) => (words[0].to_string(), words.join(" | ")),
        ParamKind::Number { default, min, max } => {
            let range = match (min > f64::from(f32::MIN), max < f64::from(f32::MAX)) {
                (true, true) => format!("{min} to {max}"),
                (true, false) if min == f64::from(f32::MIN_POSITIVE) => "above 0".to_string(),
                (true, false) => format!("at least {min}"),
                (false, true) => format!("at most {max}"),
                (false, false) => "any number".to_string(),
            };
            (default.to_string(), range)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_and_parameter_is_described() {
        for method in METHODS {
            let text = render(*method);
            assert!(text.contains(method.formula()) && text.contains(method.reference()), "{text}");
            for spec in method.params() {
                assert!(text.contains(spec.help), "{text}");
                assert!(!spelling(spec).is_empty(), "{} of {} cannot be given", spec.name, method.name());
            }
        }
    }

    #[test]
    fn parameters_are_spelled_as_they_are_given() {
        let ties = METHODS.iter().find(|method| method.name() == "ties").unwrap();
        let spelled: Vec<String> = ties.params().iter().map(spelling).collect();
        assert!(spelled.contains(&"weight *".to_string()), "{spelled:?}");
        assert!(spelled.contains(&"--density *".to_string()), "{spelled:?}");
        assert!(spelled.contains(&"--zero-sum".to_string()), "{spelled:?}");
        let json = describe(*ties);
        assert_eq!(json["params"][1]["default"], 0.2);
        assert_eq!(json["params"][0]["max"], Value::Null);
    }
}
