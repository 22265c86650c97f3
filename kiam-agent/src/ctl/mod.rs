//! `kubectl kiam`: looks at the agents of a cluster from a machine with a kubeconfig.
//!
//! It runs the agent's own commands in the agents' pods, by exec, and nothing else: whoever uses it needs just the rights for
//! that, and the agent listens nowhere for it. Whatever it prints may have been written by tenants, and is printed so that no
//! terminal obeys it.

mod advice;
mod ask;
mod check;
mod cli;
mod explain;
mod findings;
mod fleet;
mod logs;
mod output;
mod pods;
mod refresh;
mod status;
mod table;
mod trouble;

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory as _, Parser as _};
use clap_mangen::Man;
use tokio::time::sleep;

use self::{
    ask::Asker,
    cli::{Command, CommandLine, Form, Global},
    fleet::{Fleet, Place},
    logs::Options,
    output::{Report, printed, say},
    table::Screen,
};
use crate::{
    cluster::{OperatorClient, RequestFailure},
    config,
    proxy::Proxies,
};

/// The longest wait for one node's answer.
const LIMIT: Duration = Duration::from_secs(20);
/// The same for its preflight, which loads programs and asks servers.
const CHECK_LIMIT: Duration = Duration::from_secs(180);
/// What clears a terminal, and what is above it.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J\u{1b}[3J";

/// What a subcommand came to: what is printed, whether the exit status is good, and the nodes that are left out.
struct Outcome {
    text: String,
    is_good: bool,
    left_out: Vec<String>,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Client(#[from] crate::cluster::Error),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Proxies(Vec<crate::proxy::InvalidProxy>),
    #[error("the Kubernetes API: {0}")]
    Request(#[from] RequestFailure),
    #[error("{0}")]
    Logs(String),
    #[error("the pods of these nodes are left out: {}", .0.join(", "))]
    LeftOut(Vec<String>),
    #[error("the system gives no runtime: {0}")]
    Runtime(#[from] io::Error),
}

/// The lines of an error, in which others' words may stand.
fn shown(error: &Error) -> String {
    let text = error.to_string();
    text.lines().map(crate::printable::printable).collect::<Vec<_>>().join("\n")
}

/// Runs the command that is called by `name` with `arguments`.
#[must_use]
pub fn main(name: &str, arguments: &[String]) -> ExitCode {
    let words = [name].into_iter().chain(arguments.iter().map(String::as_str));
    let line = match CommandLine::try_parse_from(words) {
        Ok(line) => line,
        Err(error) => {
            // Its own choice of the output.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(config::USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(line) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {}", shown(&error));
            ExitCode::FAILURE
        }
    }
}

/// The completions of a shell, and the manual page: what needs no cluster.
fn generated(command: &Command) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    let mut line = CommandLine::command();
    match command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut line, "kubectl-kiam", &mut script);
            // The library writes the dash in a program's name in two ways, and bash then finds no flag of a subcommand.
            let script = String::from_utf8_lossy(&script);
            text.extend(script.replace("kubectl__subcmd__kiam", "kubectl__kiam").bytes());
        }
        Command::Man => {
            // Writing to memory does not fail.
            let _ = manual(line, &mut text);
        }
        _ => return None,
    }
    Some(text)
}

/// One manual page of the command and all subcommands. The one that the library renders names a page for each of them, which
/// nobody has.
fn manual(line: clap::Command, text: &mut Vec<u8>) -> io::Result<()> {
    let subcommands: Vec<_> = line.get_subcommands().cloned().collect();
    let page = Man::new(line);
    page.render_title(text)?;
    page.render_name_section(text)?;
    page.render_synopsis_section(text)?;
    page.render_description_section(text)?;
    page.render_options_section(text)?;
    writeln!(text, ".SH SUBCOMMANDS")?;
    for subcommand in subcommands {
        let name = subcommand.get_name().to_owned();
        let subcommand = subcommand.bin_name(format!("kubectl kiam {name}"));
        let section = Man::new(subcommand.disable_help_flag(true));
        let mut parts = Vec::new();
        section.render_synopsis_section(&mut parts)?;
        section.render_description_section(&mut parts)?;
        section.render_options_section(&mut parts)?;
        writeln!(text, ".SS {name}")?;
        for part in String::from_utf8_lossy(&parts).lines() {
            let head = part.starts_with(".SH ");
            writeln!(text, "{}", if head { ".PP" } else { part })?;
        }
    }
    page.render_version_section(text)
}

fn run(line: CommandLine) -> Result<bool, Error> {
    let CommandLine { global, command } = line;
    if let Some(text) = generated(&command) {
        say(&String::from_utf8_lossy(&text));
        return Ok(true);
    }
    let proxies = Proxies::from_vars(|name| env::var(name).ok()).map_err(Error::Proxies)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // The client has tasks.
    let client = {
        let _inside = runtime.enter();
        OperatorClient::new(global.kubeconfig.as_deref(), global.context.as_deref(), &proxies)?
    };
    let is_check = matches!(command, Command::Check { .. });
    let asker = Asker {
        client,
        limit: global.timeout.unwrap_or(if is_check { CHECK_LIMIT } else { LIMIT }),
        parallel: global.parallel.into(),
    };
    let done = runtime.block_on(repeated(&asker, &global, &command));
    // What was given up holds up nothing.
    runtime.shutdown_background();
    done
}

/// Runs a subcommand, again and again with `--watch`.
async fn repeated(asker: &Asker, global: &Global, command: &Command) -> Result<bool, Error> {
    loop {
        let screen = Screen::stdout(global.color);
        let outcome = once(asker, global, command, screen).await;
        let Some(pause) = global.watch else {
            let Outcome { text, is_good, left_out } = outcome?;
            say(&text);
            return if left_out.is_empty() { Ok(is_good) } else { Err(Error::LeftOut(left_out)) };
        };
        let clears = screen.width.is_some() && global.output == Form::Text;
        let text = match outcome {
            Ok(outcome) => outcome.text,
            // The API server may be back for the next round.
            Err(error) => shown(&error) + "\n",
        };
        if !say(&(if clears { CLEAR.to_owned() + &text } else { text })) {
            return Ok(true);
        }
        sleep(pause).await;
    }
}

async fn once(
    asker: &Asker,
    global: &Global,
    command: &Command,
    screen: Screen,
) -> Result<Outcome, Error> {
    let place = Place {
        namespace: global.agent_namespace.clone(),
        selector: global.agent_selector.clone(),
    };
    let fleet = |only| Fleet::find(&asker.client, &place, only);
    let show = |report: &dyn Shown| Outcome {
        text: report.shown(global.output, screen),
        is_good: report.is_good(),
        left_out: report.left_out(),
    };
    Ok(match command {
        Command::Status { node } => show(&status::status(asker, fleet(node).await?).await),
        Command::Explain { pod } => show(&explain::explain(asker, &place, pod).await?),
        Command::Pods { selection, all } => {
            let known = pods::known(asker, fleet(&selection.node).await?, selection).await;
            show(&known.report(*all))
        }
        Command::Refresh { pod } => show(&refresh::refresh(asker, &place, pod).await?),
        Command::V1Users { selection } => {
            let known = pods::known(asker, fleet(&selection.node).await?, selection).await;
            show(&known.v1())
        }
        Command::Check { node } => show(&check::check(asker, fleet(node).await?).await),
        Command::Logs { of, follow, previous, tail, since } => {
            let options = Options {
                of: of.clone(),
                follow: *follow,
                previous: *previous,
                tail: *tail,
                since: *since,
            };
            logs::logs(&asker.client, &place, options).await.map_err(Error::Logs)?;
            Outcome { text: String::new(), is_good: true, left_out: Vec::new() }
        }
        Command::Completions { .. } | Command::Man => {
            Outcome { text: String::new(), is_good: true, left_out: Vec::new() }
        }
    })
}

/// A [`Report`], whichever.
trait Shown {
    fn shown(&self, form: Form, screen: Screen) -> String;
    fn is_good(&self) -> bool;
    fn left_out(&self) -> Vec<String>;
}

impl<R: Report> Shown for R {
    fn shown(&self, form: Form, screen: Screen) -> String {
        printed(self, form, screen)
    }

    fn is_good(&self) -> bool {
        Report::is_good(self)
    }

    fn left_out(&self) -> Vec<String> {
        Report::left_out(self)
    }
}
