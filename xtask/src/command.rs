//! Running other programs: shown before they run, with an environment that does not depend on who started us.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// The folder of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Prints one line about what is being done, apart from what the programs print.
pub fn say(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// A command in the workspace's folder whose environment is the user's: what `cargo run` and rustup's proxies set for
/// us (the toolchain, the package, compilers and flags of the outer build) is taken out.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.current_dir(workspace());
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            command.env_remove(name);
        }
    }
    command
}

fn belongs_to_outer_build(name: &str) -> bool {
    const NAMES: [&str; 12] = [
        "CARGO",
        "CARGO_CRATE_NAME",
        "CARGO_TARGET_TMPDIR",
        "LD_LIBRARY_PATH",
        "OUT_DIR",
        "RUSTC",
        "RUSTC_BOOTSTRAP",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUST_RECURSION_COUNT",
    ];
    const PREFIXES: [&str; 6] = [
        "CARGO_BIN_",
        "CARGO_BUILD_",
        "CARGO_ENCODED_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_PRIMARY_",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The command as a line that can be pasted into a shell, with the variables it sets.
pub fn shown(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={}", name.to_str()?, quoted(value?.to_str()?)))
    });
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quoted(&word.to_string_lossy()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Shows the command, runs it with our output, and fails with the same line when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    say(format!("$ {line}"));
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// What a command prints on its standard output, or nothing if it can't be run or fails.
pub fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a command prints on its standard output. Fails with what it says where it fails.
pub fn printed(command: &mut Command) -> Result<String> {
    printed_for(command, "")
}

/// The same of a command that reads `input`.
pub fn printed_for(command: &mut Command, input: &str) -> Result<String> {
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        // One that ends before it has read all of it says why.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        child.wait_with_output()
    });
    let output = output.with_context(|| format!("waiting for {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} ended with {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_command_can_be_pasted() {
        let mut command = Command::new("cargo");
        command.args(["build", "it's"]).env("RUSTFLAGS", "-C link-arg=--btf").env_remove("RUSTC");
        assert_eq!(shown(&command), r"RUSTFLAGS='-C link-arg=--btf' cargo build 'it'\''s'");
    }

    #[test]
    fn what_a_command_prints_is_returned_and_what_it_complains_of_is_the_error() {
        let shell = |script| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(printed_for(&mut shell("cat; echo b"), "a\n").unwrap(), "a\nb\n");
        let error = printed(&mut shell("echo x; echo complaint >&2; exit 3")).unwrap_err();
        assert_eq!(error.to_string(), "sh ended with exit status: 3: complaint");
    }

    #[test]
    fn outer_build_is_told_from_the_users_settings() {
        for ours in
            ["CARGO", "RUSTFLAGS", "RUSTUP_TOOLCHAIN", "CARGO_MANIFEST_DIR", "CARGO_PKG_NAME"]
        {
            assert!(belongs_to_outer_build(ours), "{ours}");
        }
        for theirs in [
            "CARGO_HOME",
            "CARGO_NET_OFFLINE",
            "CARGO_REGISTRIES_X_INDEX",
            "PATH",
            "HOME",
            "CARGO_HTTP_PROXY",
        ] {
            assert!(!belongs_to_outer_build(theirs), "{theirs}");
        }
    }
}
