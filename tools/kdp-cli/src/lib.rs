//! Man pages and shell completions, generated from the definition of a command line.
//!
//! The binaries of this workspace flatten [`Generate`] into their subcommands. So each binary has
//! these two hidden subcommands:
//!
//! ```
//! use clap::Parser;
//! use kdp_cli::Generate;
//!
//! #[derive(Parser)]
//! #[command(name = "tool")]
//! enum Tool {
//!     /// Do the work
//!     Work,
//!     #[command(flatten)]
//!     Generate(Generate),
//! }
//!
//! # let dir = tempfile::tempdir().unwrap();
//! # let line = ["tool".as_ref(), "completions".as_ref(), dir.path().as_os_str()];
//! if let Tool::Generate(generate) = Tool::parse_from(line) {
//!     generate.run::<Tool>()?;
//! }
//! # Ok::<(), kdp_cli::Error>(())
//! ```

#![deny(missing_docs)]

use clap::{ArgGroup, Command, CommandFactory, Id, Subcommand};
use clap_complete::Shell;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The shells that completions are generated for.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// Files could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    /// Which files, and into which directory.
    pub what: String,
    /// The error of the file system.
    pub source: io::Error,
}

/// The hidden subcommands that generate files for packages.
#[derive(Debug, Subcommand)]
pub enum Generate {
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        dir: PathBuf,
    },
    /// Write the completions for bash, zsh and fish into a directory
    #[command(hide = true)]
    Completions {
        /// The directory
        dir: PathBuf,
    },
}

impl Generate {
    /// Generates the files for the command line `C`. Creates the directory if it does not exist.
    pub fn run<C: CommandFactory>(&self) -> Result<(), Error> {
        let (what, dir, generate): (_, _, fn(_, &Path) -> _) = match self {
            Self::Man { dir } => ("man pages", dir, man_pages),
            Self::Completions { dir } => ("completions", dir, completions),
        };
        fs::create_dir_all(dir)
            .and_then(|()| generate(C::command(), dir))
            .map_err(|source| Error {
                what: format!("cannot write {what} into {}", dir.display()),
                source,
            })
    }
}

/// Writes NAME.1, and NAME-SUBCOMMAND.1 for each subcommand that is not hidden.
fn man_pages(command: Command, dir: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    // Subcommands get their full names and the global options.
    command.build();
    clap_mangen::generate_to(command, dir)
}

/// Writes NAME.bash, _NAME and NAME.fish.
fn completions(command: Command, dir: &Path) -> io::Result<()> {
    let mut command = without_hidden(&command);
    let name = command.get_name().to_owned();
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut command, &name, dir)?;
    }
    Ok(())
}

/// Removes hidden subcommands and options from a command line: clap_complete would complete them.
fn without_hidden(command: &Command) -> Command {
    let args = || command.get_arguments().filter(|arg| !arg.is_hide_set());
    let subcommands = command.get_subcommands();
    let mut shown = Command::new(command.get_name().to_owned())
        .args(args().cloned())
        .groups(command.get_groups().map(|group| {
            let member = |id: &&Id| args().any(|arg| arg.get_id() == *id);
            ArgGroup::new(group.get_id().clone())
                .args(group.get_args().filter(member).cloned())
                .multiple(true)
        }))
        .subcommands(
            subcommands
                .filter(|subcommand| !subcommand.is_hide_set())
                .map(without_hidden),
        );
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        shown = shown.version(version.to_owned());
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, Parser};

    #[derive(Parser)]
    #[command(name = "tool", version = "1.2")]
    struct Tool {
        #[command(subcommand)]
        _work: Work,
    }

    #[derive(Subcommand)]
    enum Work {
        /// Dig a hole
        Dig(Dig),
        #[command(flatten)]
        Generate(Generate),
    }

    #[derive(Args)]
    #[command(group = ArgGroup::new("place").args(["here", "there"]))]
    struct Dig {
        /// In the garden
        #[arg(long)]
        here: bool,
        #[arg(long, hide = true)]
        there: bool,
    }

    fn generate(line: &str) -> (tempfile::TempDir, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let line = ["tool".as_ref(), line.as_ref(), path.as_os_str()];
        let Work::Generate(generate) = Tool::try_parse_from(line).unwrap()._work else {
            panic!("{line:?} is not a subcommand that generates");
        };
        generate.run::<Tool>().unwrap();
        let mut names: Vec<String> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        (dir, names)
    }

    #[test]
    fn man_pages_are_those_of_visible_subcommands() {
        let (dir, names) = generate("man");
        assert_eq!(names, ["tool-dig.1", "tool.1"]);
        let page = fs::read_to_string(dir.path().join("new/tool-dig.1")).unwrap();
        assert!(page.contains("In the garden"), "{page}");
    }

    #[test]
    fn completions_are_for_each_shell_and_lack_what_is_hidden() {
        let (dir, names) = generate("completions");
        assert_eq!(names, ["_tool", "tool.bash", "tool.fish"]);
        for name in names {
            let text = fs::read_to_string(dir.path().join("new").join(&name)).unwrap();
            for shown in ["dig", "here", "version"] {
                assert!(text.contains(shown), "{name} lacks {shown}: {text}");
            }
            for hidden in ["completions", "there"] {
                assert!(!text.contains(hidden), "{name} has {hidden}: {text}");
            }
        }
    }

    #[test]
    fn a_failure_names_the_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let dir = file.path().join("dir");
        let error = Generate::Man { dir: dir.clone() }
            .run::<Tool>()
            .unwrap_err();
        let expected = format!("cannot write man pages into {}: ", dir.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
