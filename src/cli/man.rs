//! `tiesmith man`: manual pages, one per command, from the same definition as `--help`.

use clap::CommandFactory;
use clap_mangen::Man;
use tiesmith::{Disk, Error, IoMode, Result, Storage};

use super::args::{Cli, ManArgs};
use super::print;

/// Runs the command.
pub fn run(args: &ManArgs) -> Result<u8> {
    let mut pages = pages()?;
    if let Some(dir) = &args.out {
        let storage = Disk::new(IoMode::Auto);
        storage.create_dir_all(dir).map_err(Error::as_input)?;
        for (name, page) in &pages {
            storage.write_small(&dir.join(format!("{name}.1")), page.as_bytes(), dir).map_err(Error::as_input)?;
        }
        return Ok(0);
    }
    if let Some(command) = &args.command {
        let names: Vec<String> =
            pages.iter().filter_map(|(n, _)| n.strip_prefix("tiesmith-").map(Into::into)).collect();
        pages.retain(|(name, _)| name.strip_prefix("tiesmith-") == Some(command));
        if pages.is_empty() {
            return Err(Error::usage(format!("no command '{command}'")).help(format!("one of: {}", names.join(", "))));
        }
    }
    print(&pages.into_iter().map(|(_, page)| page).collect::<String>())
}

/// Every page with its name: `tiesmith`, then `tiesmith-merge` and so on.
fn pages() -> Result<Vec<(String, String)>> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let version = env!("CARGO_PKG_VERSION");
    let mut commands = vec![root.clone()];
    for command in root.get_subcommands() {
        let name = format!("tiesmith-{}", command.get_name());
        commands.push(command.clone().display_name(name).version(version));
    }
    let page = |command: clap::Command| {
        let name = command.get_display_name().unwrap_or("tiesmith").to_string();
        let mut page = Vec::new();
        let rendered = Man::new(command).render(&mut page);
        rendered.map_err(|e| Error::failed(format!("cannot render the manual page {name}: {e}")))?;
        Ok((name, String::from_utf8_lossy(&page).into_owned()))
    };
    commands.into_iter().map(page).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names[..3], ["tiesmith", "tiesmith-merge", "tiesmith-plan"]);
        assert!(pages[1].1.contains("\\-\\-density"));
        assert!(pages.iter().all(|(_, page)| page.contains(".TH")));
    }
}
