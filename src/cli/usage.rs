//! clap's errors as the one line that every error of this program is.

use std::ffi::OsString;

use clap::CommandFactory;
use clap::error::ErrorKind;
use tiesmith::Error;

use super::args::Cli;

/// `error` without its layout: what is wrong, clap's tip, and where to read more.
pub fn flatten(error: &clap::Error, argv: &[OsString]) -> Error {
    let command = subcommand(argv);
    let help = match &command {
        Some(name) => format!("see 'tiesmith {name} --help'"),
        None => "see 'tiesmith --help'".to_string(),
    };
    if matches!(error.kind(), ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand) {
        return Error::usage(format!("no command given, one of: {}", commands().join(", "))).help(help);
    }
    let rendered = error.render().to_string();
    let mut parts: Vec<String> = Vec::new();
    for paragraph in rendered.split("\n\n") {
        let text = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        let layout = ["Usage:", "For more information"];
        if !text.is_empty() && !layout.iter().any(|start| text.starts_with(start)) {
            parts.push(tidy(&text));
        }
    }
    Error::usage(parts.join("; ")).help(help)
}

/// Drops clap's labels; the sentence that follows says the same.
fn tidy(text: &str) -> String {
    text.strip_prefix("error: ").unwrap_or(text).replace("tip: ", "")
}

fn commands() -> Vec<String> {
    Cli::command().get_subcommands().map(|command| command.get_name().to_string()).collect()
}

/// The subcommand that `argv` names.
fn subcommand(argv: &[OsString]) -> Option<String> {
    let first = argv.iter().skip(1).find(|argument| !argument.as_encoded_bytes().starts_with(b"-"))?;
    commands().into_iter().find(|name| first.to_str() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn message(argv: &[&str]) -> String {
        let argv: Vec<OsString> = argv.iter().map(OsString::from).collect();
        flatten(&Cli::try_parse_from(&argv).unwrap_err(), &argv).to_string()
    }

    #[test]
    fn errors_are_one_line_with_tip_and_pointer() {
        let text = message(&["tiesmith", "merge", "--densty", "0.2"]);
        assert_eq!(
            text,
            "unexpected argument '--densty' found; a similar argument exists: '--density'; \
             see 'tiesmith merge --help'"
        );
    }

    #[test]
    fn values_are_explained() {
        let text = message(&["tiesmith", "merge", "--memory", "2G"]);
        assert!(text.starts_with("invalid value '2G' for '--memory <SIZE>': 'G' is ambiguous"), "{text}");
        let text = message(&["tiesmith", "merge", "--elect", "mas"]);
        assert!(text.contains("[possible values: mass, count, none]; "), "{text}");
        assert!(text.contains("a similar value exists: 'mass'"), "{text}");
        assert!(!text.contains('\n'));
    }

    #[test]
    fn a_missing_or_unknown_command_lists_or_suggests_one() {
        let text = message(&["tiesmith"]);
        assert!(
            text.starts_with("no command given, one of: merge, plan, analyze, perturb, run, finish, slurm, inspect"),
            "{text}"
        );
        assert!(text.ends_with("see 'tiesmith --help'"), "{text}");
        let text = message(&["tiesmith", "merg"]);
        assert!(text.contains("'merg'") && text.contains("'merge'"), "{text}");
    }

    #[test]
    fn hostile_arguments_cannot_break_the_line() {
        let text = message(&["tiesmith", "merge", "--x\n\u{1b}[31m\n\nUsage: y"]);
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
}
