//! The program as a script sees it, where no daemon is needed: output, errors, exit statuses.

#[path = "supply.rs"]
mod supply;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// Runs `ctfs` with nothing of this machine's settings, and its own empty state directory.
fn ctfs(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ctfs"))
        .args(args)
        .env_remove("CTFS_TOKEN")
        .env_remove("CTFS_LOG")
        .env("CTFS_STATE", dir.join("state"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn assert_fails(output: &Output, status: i32, code: &str) {
    let error = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{error}");
    assert!(error.starts_with(&format!("error[{code}]: ")), "{error}");
    assert_eq!(stdout(output), "", "errors are talk, not data");
}

#[test]
fn help_lists_every_verb_and_exits_0() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctfs(dir.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    for verb in ["up", "down", "mount", "umount", "token", "status", "nodes", "node", "df", "info", "policy", "cache", "config", "version"] {
        assert!(stdout(&output).contains(&format!("\n  {verb} ")), "{verb}");
        assert_eq!(ctfs(dir.path(), &[verb, "--help"]).status.code(), Some(0), "{verb}");
    }
    assert!(!stdout(&output).contains("\n  daemon"), "the daemon verb is not for people");
}

#[test]
fn a_mistyped_verb_is_a_usage_error_with_a_suggestion() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctfs(dir.path(), &["statsu"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'status'"));
}

#[test]
fn version_has_a_form_for_machines() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(stdout(&ctfs(dir.path(), &["version"])), format!("ctfs {}\n", env!("CARGO_PKG_VERSION")));
    assert!(stdout(&ctfs(dir.path(), &["version", "--json"])).contains("\"schema\": 1"));
}

#[test]
fn looking_where_no_daemon_runs_exits_3() {
    let dir = tempfile::tempdir().unwrap();
    for verb in [&["status"][..], &["status", "--json"], &["nodes"], &["df"], &["token"], &["cache", "drop"], &["info", "/tmp"], &["umount"], &["node", "remove", "x", "--yes"]] {
        assert_fails(&ctfs(dir.path(), verb), 3, "E0117");
    }
    assert!(!dir.path().join("state").exists(), "looking creates nothing");
}

#[test]
fn waiting_for_a_cluster_that_does_not_come_times_out_with_7() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctfs(dir.path(), &["status", "--wait", "healthy", "--timeout", "600ms"]);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
}

#[test]
fn down_is_safe_to_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctfs(dir.path(), &["down"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).starts_with("already down"));
}

#[test]
fn removing_a_server_without_a_terminal_names_the_flag() {
    let dir = tempfile::tempdir().unwrap();
    let output = ctfs(dir.path(), &["node", "remove", "x"]);
    assert_fails(&output, 2, "E0132");
    assert!(stderr(&output).contains("--yes"));
}

#[test]
fn up_refuses_a_path_it_cannot_mount_on_before_anything_is_created() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("file"), "x").unwrap();
    fs::create_dir(path("full")).unwrap();
    fs::write(path("full/file"), "x").unwrap();
    // Without root all of these end at the first question, whether one may mount at all.
    if rustix::process::geteuid().is_root() {
        assert_fails(&ctfs(dir.path(), &["up", &path("file")]), 1, "E0101");
        assert_fails(&ctfs(dir.path(), &["up", &path("full")]), 1, "E0102");
        assert_fails(&ctfs(dir.path(), &["up", "/proc"]), 1, "E0103");
        assert_fails(&ctfs(dir.path(), &["up", &path("state/mnt")]), 2, "E0120");
    } else {
        assert_fails(&ctfs(dir.path(), &["up", &path("mnt")]), 1, "E0118");
    }
    assert_fails(&ctfs(dir.path(), &["up"]), 2, "E0133");
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_bad_token_is_named_as_such_wherever_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    // Not mountable either: should a bad token ever pass, no server comes of it.
    let mount = "/proc";
    let file = dir.path().join("token");
    fs::write(&file, "hello\n").unwrap();
    for token in ["hello", "ctfs1-", "ctfs1-zzzz", "-", &format!("@{}", file.display())] {
        let output = ctfs(dir.path(), &["up", mount, "--join", token]);
        assert_fails(&output, 2, "E0110");
    }
    assert_fails(&ctfs(dir.path(), &["up", mount, "--join", "@/does/not/exist"]), 1, "E0100");
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_configuration_with_an_unknown_key_is_refused_with_line_and_suggestion() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ctfs.toml");
    fs::write(&file, "[cache]\n# room for a night's work\nsizee = \"1GiB\"\n").unwrap();
    let file = file.to_str().unwrap();
    let check = ctfs(dir.path(), &["config", "check", file]);
    assert_fails(&check, 6, "E0116");
    assert!(stderr(&check).contains("line 3: unknown key `sizee` in [cache]"));
    assert!(stderr(&check).contains("did you mean `size`?"));
    assert_fails(&ctfs(dir.path(), &["up", "/nonexistent/mnt", "--config", file]), 2, "E0116");

    fs::write(file, "[cache]\nsize = \"1GiB\"\n").unwrap();
    assert_eq!(ctfs(dir.path(), &["config", "check", file]).status.code(), Some(0));
}

#[test]
fn values_are_checked_while_the_command_line_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["up", "/x", "--cache-size", "lots"][..],
        &["up", "/x", "--name", "a b"],
        &["up", "/x", "--listen", "7420"],
        &["up", "/x", "--advertise", "0.0.0.0:7420"],
        &["up", "/x", "--no-mount"],
        &["token", "--uses", "0"],
        &["token", "--ttl", "1y"],
        &["policy", "set", "/x"],
        &["policy", "set", "/x", "--chunk-size", "3MiB"],
        &["status", "--timeout", "5s"],
    ] {
        let output = ctfs(dir.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
    }
}
