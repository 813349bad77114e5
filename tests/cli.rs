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
    for verb in ["up", "down", "mount", "umount", "token", "status", "nodes", "node", "df", "info", "diff", "policy", "quota", "cache", "config", "version"] {
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
        assert!(stderr(&output).starts_with("error[E01") && stderr(&output).contains("\n  try   "), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn diff_tells_each_difference_on_a_line_and_by_its_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("a")).unwrap();
    for name in ["one", "two", "new\nline"] {
        fs::write(dir.path().join("a").join(name), "text").unwrap();
    }
    let copied = Command::new("cp").args(["-a", &path("a"), &path("b")]).status().unwrap();
    assert!(copied.success());

    let same = ctfs(dir.path(), &["diff", &path("a"), &path("b")]);
    assert_eq!((same.status.code(), stdout(&same).as_str()), (Some(0), "the same: 4 names, 12 B of content\n"));

    let keep = fs::metadata(path("b")).unwrap().modified().unwrap();
    fs::remove_file(path("b/new\nline")).unwrap();
    fs::write(path("b/three"), "").unwrap();
    fs::File::open(path("b")).unwrap().set_modified(keep).unwrap();
    let lines = "missing  new\\nline: file -> nothing\nextra    three: nothing -> file\n";
    let different = ctfs(dir.path(), &["diff", &path("a"), &path("b")]);
    assert_eq!(different.status.code(), Some(6), "{}", stderr(&different));
    assert_eq!(stdout(&different), format!("{lines}2 differences in 5 names, 8 B of content\n"));

    let limited = ctfs(dir.path(), &["diff", "--limit", "1", &path("a"), &path("b")]);
    assert_eq!(limited.status.code(), Some(6));
    assert!(stdout(&limited).starts_with(lines.split_inclusive('\n').next().unwrap()), "{}", stdout(&limited));
    assert!(stdout(&limited).ends_with("; 1 difference not shown\n") && stdout(&limited).lines().count() == 2, "{}", stdout(&limited));
}

#[test]
fn an_answer_that_cannot_be_written_is_no_success() {
    // `ctfs diff a b > report` on a full disk said that they are the same, and wrote nothing.
    let dir = tempfile::tempdir().unwrap();
    let same = dir.path().to_str().unwrap();
    for args in [&["version"][..], &["version", "--json"], &["diff", same, same], &["diff", "--json", same, same]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_ctfs")).args(args).stdout(full).output().unwrap();
        assert_fails(&output, 1, "E0115");
    }
}

#[test]
fn an_address_of_another_machine_is_told_from_one_that_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    // From the block for documentation, RFC 5737.
    let output = ctfs(dir.path(), &["up", "--no-mount", "--foreground", "--listen", "192.0.2.1:7420"]);
    assert_fails(&output, 1, "E0104");
    assert!(stderr(&output).contains("no such address") && !stderr(&output).contains("ss -ulpn"), "{}", stderr(&output));
}

#[test]
fn diff_has_a_form_for_machines_which_is_one_object_whatever_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("a")).unwrap();
    fs::write(path("a/f"), "x").unwrap();
    assert!(Command::new("cp").args(["-a", &path("a"), &path("b")]).status().unwrap().success());
    let json = |args: &[&str]| {
        let output = ctfs(dir.path(), &[&["diff", "--json", &path("a"), &path("b")], args].concat());
        serde_json::from_str::<serde_json::Value>(&stdout(&output)).unwrap_or_else(|e| panic!("{e}: {}", stdout(&output)))
    };
    let same = json(&[]);
    let expected = serde_json::json!({
        "schema": 1, "verdict": "same", "differences": [], "errors": [], "mounts": [], "counts": {},
        "differences_found": 0, "errors_found": 0, "not_entered": 0, "entries": 2, "bytes": 1,
    });
    assert_eq!(same, expected);

    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path("b/f"), fs::Permissions::from_mode(0o4600)).unwrap();
    fs::set_permissions(path("a/f"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(path("b"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(path("a"), fs::Permissions::from_mode(0o755)).unwrap();
    let different = json(&[]);
    let mode = |path: &str, source: &str, target: &str| serde_json::json!({ "path": path, "what": "mode", "source": source, "target": target });
    assert_eq!(different["differences"], serde_json::json!([mode(".", "0755", "0700"), mode("f", "0644", "4600")]));
    assert_eq!((&different["verdict"], &different["counts"]["mode"]), (&"different".into(), &2.into()));
    for limit in ["0", "1"] {
        let limited = json(&["--limit", limit]);
        assert_eq!(limited["differences"].as_array().unwrap().len().to_string(), limit);
        assert_eq!(limited["differences_found"], 2);
    }
}

#[test]
fn diff_names_what_it_cannot_open() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().to_str().unwrap();
    let missing = ctfs(dir.path(), &["diff", here, "/does/not/exist"]);
    assert_fails(&missing, 1, "E0100");
    assert!(stderr(&missing).contains("why") && stderr(&missing).contains("try   check the path"), "{}", stderr(&missing));
    for args in [&["diff", here][..], &["diff", here, here, "--threads", "0"], &["diff", here, here, "--limit", "some"]] {
        assert_eq!(ctfs(dir.path(), args).status.code(), Some(2), "{args:?}");
    }
}
