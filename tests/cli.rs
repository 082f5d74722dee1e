//! The command line: what it writes, and how it refuses.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

fn model() -> PathBuf {
    support::golden_dir(support::MODEL)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemma-cuda"));
    command.args(args).stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn run_with_stdin(args: &[&str], stdin: &[u8]) -> Output {
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    child.wait_with_output().unwrap()
}

fn generate(args: &[&str]) -> Output {
    run(&[&["generate", "--device", "reference", "--model", model().to_str().unwrap()], args].concat())
}

/// Bad input: exit code 2, nothing on standard output, one line that names the thing.
fn assert_refused(output: &Output, names: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(output.stdout.is_empty());
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(stderr.contains(names), "{names:?} is not in: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn json_lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn bad_numbers_are_refused_by_name() {
    let ids = ["--prompt-ids", "2,5,9"];
    let cases: [(&[&str], &str); 14] = [
        (&["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (&["--max-new-tokens", "2", "--min-new-tokens", "3"], "min_new_tokens is 3"),
        (&["--temperature", "-1"], "temperature is -1"),
        (&["--temperature", "NaN"], "temperature is NaN"),
        (&["--top-p", "-0.5"], "top_p is -0.5"),
        (&["--top-p", "1.5"], "top_p is 1.5"),
        (&["--top-p", "0"], "top_p is 0"),
        (&["--min-p", "2"], "min_p is 2"),
        (&["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (&["--presence-penalty", "inf"], "presence_penalty is inf"),
        (&["--logit-bias", "512=1"], "token 512"),
        (&["--stop", ""], "stop string is empty"),
        (&["--json", "--logprobs", "21"], "logprobs is 21"),
        (&["--stop-token", "999"], "stop token 999"),
    ];
    for (args, names) in cases {
        assert_refused(&generate(&[&ids, args].concat()), names);
    }
}

#[test]
fn bad_prompts_are_refused_by_name() {
    assert_refused(&generate(&["--prompt", ""]), "prompt is empty");
    assert_refused(&generate(&[]), "prompt is empty");
    assert_refused(&generate(&["--prompt-ids", ""]), "prompt is empty");
    assert_refused(&generate(&["--prompt-ids", "2,x"]), "\"x\"");
    assert_refused(&generate(&["--prompt-ids", "2,512"]), "512");
    assert_refused(&generate(&["--prompt", "text"]), "tokenizer.json");
    assert_refused(&generate(&["--prompts-file", "/no/such/file"]), "/no/such/file");
    let long = vec!["5"; 130].join(",");
    assert_refused(&generate(&["--prompt-ids", &long]), "context is 128");
    let half = vec!["5"; 60].join(",");
    assert_refused(&generate(&["--prompt-ids", &half, "--kv-cache", "32"]), "KV cache holds 32");
    assert_refused(&generate(&["--prompt-ids", &half, "--max-new-tokens", "100"]), "context is 128");
}

#[test]
fn standard_input_must_be_utf8() {
    let model = model();
    let args = ["generate", "--model", model.to_str().unwrap()];
    let output = run_with_stdin(&args, b"good \xff bad");
    assert_refused(&output, "standard input is not valid UTF-8 (byte 5)");
}

#[test]
fn bad_checkpoints_and_devices_are_refused_by_name() {
    let with_model = |dir: &Path, more: &[&str]| {
        run(&[&["generate", "--prompt-ids", "2", "--model", dir.to_str().unwrap()], more].concat())
    };
    assert_refused(&with_model(Path::new("/no/such/folder"), &[]), "/no/such/folder");
    let file = model().join("config.json");
    assert_refused(&with_model(&file, &[]), "config.json");
    let empty = tempfile::tempdir().unwrap();
    assert_refused(&with_model(empty.path(), &[]), "config.json");
    for name in ["fp16", "float16"] {
        assert_refused(&with_model(&model(), &["--dtype", name]), "overflow float16");
    }
    assert_refused(&with_model(&model(), &["--dtype", "int3"]), "int3");
    assert_refused(&with_model(&model(), &["--device", "tpu"]), "tpu");
    assert_refused(&with_model(&model(), &["--kv-cache", "10GB"]), "10GB");
    assert_refused(&with_model(&model(), &["--kv-cache", "400GiB"]), "are free");
    assert_refused(&with_model(&model(), &["--page-size", "0"]), "page_size is 0");
    assert_refused(&with_model(&model(), &["--log", "no=such=filter"]), "--log");
}

#[test]
fn several_prompts_come_back_in_order_as_json() {
    let output = generate(&[
        "--prompt-ids",
        "2,5,9",
        "--prompt-ids",
        "7",
        "-n",
        "4",
        "--ignore-eos",
        "--json",
        "--logprobs",
        "2",
        "--temperature",
        "1",
    ]);
    let lines = json_lines(&output);
    assert_eq!(lines.len(), 2);
    for (index, prompt) in [vec![2, 5, 9], vec![7]].into_iter().enumerate() {
        let line = &lines[index];
        assert_eq!(line["index"], index);
        assert_eq!(line["prompt_token_ids"], serde_json::json!(prompt));
        assert_eq!(line["token_ids"].as_array().unwrap().len(), 4);
        assert_eq!(line["finish_reason"], "length");
        assert_eq!(line["logprobs"][0]["top"].as_array().unwrap().len(), 2);
        assert!(line["seed"].is_u64());
    }
}

#[test]
fn the_golden_values_are_reproduced_and_limits_decide_the_exit_code() {
    let golden = model().join("golden.safetensors");
    let verify = |more: &[&str]| {
        let dir = model();
        let args = ["verify", "--model", dir.to_str().unwrap(), "--golden", golden.to_str().unwrap()];
        run(&[&args, more].concat())
    };
    let good = verify(&["--dtype", "f32", "--device", "reference", "--max-abs", "1e-3", "--greedy", "--json"]);
    let report = &json_lines(&good)[0];
    assert_eq!(report["greedy_equal"], true);
    assert_eq!(report["prompts"].as_array().unwrap().len(), 8);
    assert_eq!(report["prompts"][3]["hidden"].as_array().unwrap().len(), 5);
    let beyond = verify(&["--dtype", "bf16", "--max-abs", "1e-3"]);
    assert_eq!(beyond.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&beyond.stderr).contains("max abs"));
    assert!(!beyond.stdout.is_empty());
    let other = tempfile::tempdir().unwrap();
    let file = other.path().join("bad.safetensors");
    std::fs::write(&file, b"not a safetensors file").unwrap();
    let dir = model();
    let bad = run(&["verify", "--model", dir.to_str().unwrap(), "--golden", file.to_str().unwrap()]);
    assert_refused(&bad, "bad.safetensors");
}

#[test]
fn inspect_says_what_is_there() {
    let dir = model();
    let args = ["inspect", "--check", "--json", "--model", dir.to_str().unwrap()];
    let summary = &json_lines(&run(&args))[0];
    assert_eq!(summary["parameters"], 345_696);
    assert_eq!(summary["finite"], true);
    assert_eq!(summary["layers"].as_array().unwrap().len(), 2);
    let text = run(&["inspect", "--model", dir.to_str().unwrap()]);
    assert!(String::from_utf8(text.stdout).unwrap().contains("2 x window 8"));
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let dir = model();
    let mut args = vec!["generate", "--json", "--ignore-eos", "--model", dir.to_str().unwrap()];
    args.extend(["--prompt-ids", "2"].repeat(50));
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(unix)]
#[test]
fn an_interrupt_keeps_what_was_generated() {
    let dir = support::model_with(|config| config["max_position_embeddings"] = 200_000.into());
    let args = [
        "generate",
        "--model",
        dir.path().to_str().unwrap(),
        "--device",
        "reference",
        "--kv-cache",
        "200000",
        "--prompt-ids",
        "2,5",
        "-n",
        "190000",
        "--ignore-eos",
        "--json",
        "--log",
        "info",
    ];
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("loaded") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended before it had loaded");
    }
    std::thread::sleep(Duration::from_millis(500));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["finish_reason"], "cancelled");
    let tokens = line["token_ids"].as_array().unwrap().len();
    assert!(tokens > 0 && tokens < 190_000, "{tokens} tokens");
}

#[test]
fn text_comes_from_standard_input_a_file_and_the_command_line() {
    let dir = support::model_with_text();
    let model = dir.path().to_str().unwrap();
    let args = ["generate", "--model", model, "-n", "8", "--ignore-eos", "--json"];
    let stdin = json_lines(&run_with_stdin(&args, b"hello\n"));
    let option = json_lines(&run(&[&args[..], &["--prompt", "hello"]].concat()));
    assert_eq!(stdin[0]["prompt_token_ids"], option[0]["prompt_token_ids"]);
    assert_eq!(stdin[0]["text"], option[0]["text"]);
    assert_eq!(stdin[0]["prompt_token_ids"].as_array().unwrap().len(), 6);

    let file = dir.path().join("prompts.txt");
    std::fs::write(&file, "hello\n\nworld\n").unwrap();
    let lines = json_lines(&run(&[&args[..], &["--prompts-file", file.to_str().unwrap()]].concat()));
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["text"], option[0]["text"]);

    let plain = run(&["generate", "--model", model, "-n", "8", "--ignore-eos", "--prompt", "hello"]);
    assert_eq!(String::from_utf8(plain.stdout).unwrap(), format!("{}\n", option[0]["text"].as_str().unwrap()));
}

#[test]
fn chat_reads_lines_and_obeys_its_commands() {
    let dir = support::model_with_text();
    let args = ["chat", "--model", dir.path().to_str().unwrap(), "-n", "4", "--greedy"];
    let said_once = run_with_stdin(&args, b"hi\n");
    assert_eq!(said_once.status.code(), Some(0), "{}", String::from_utf8_lossy(&said_once.stderr));
    let once = String::from_utf8(said_once.stdout).unwrap();
    let twice = run_with_stdin(&args, b"hi\n/reset\nhi\n/nonsense\n/exit\nnever said\n");
    assert_eq!(String::from_utf8(twice.stdout).unwrap(), once.repeat(2));
    assert!(String::from_utf8(twice.stderr).unwrap().contains("no command /nonsense"));
    assert_refused(&run_with_stdin(&args, b"\xff\n"), "not valid UTF-8");

    let mute = model();
    assert_refused(&run(&["chat", "--model", mute.to_str().unwrap()]), "no chat template");
}

#[test]
fn eval_measures_a_text() {
    let dir = support::model_with_text();
    let args = ["eval", "--model", dir.path().to_str().unwrap(), "--window", "8", "--json"];
    let result = &json_lines(&run_with_stdin(&args, b"some words to predict"))[0];
    assert_eq!(result["tokens"], 21);
    assert_eq!(result["windows"], 3);
    let (nll, perplexity) = (result["nll"].as_f64().unwrap(), result["perplexity"].as_f64().unwrap());
    assert!((perplexity - (nll / 21.0).exp()).abs() < 1e-9 * perplexity);
    assert_refused(&run_with_stdin(&args, b""), "empty");
    let wide = ["eval", "--model", dir.path().to_str().unwrap(), "--window", "129"];
    assert_refused(&run_with_stdin(&wide, b"text"), "between 2 and 128");
}

#[test]
fn bench_writes_a_line_a_workload_and_configuration() {
    let dir = model();
    let args = ["bench", "--device", "reference", "--max-new", "3", "--model", dir.to_str().unwrap(), "--json"];
    let rows = json_lines(&run(&[&args[..], &["--workload", "tutorial", "--no-graphs", "--repeat", "2"]].concat()));
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((&row["workload"], &row["configuration"]), (&"tutorial".into(), &"ragged".into()));
    assert_eq!((&row["requests"], &row["prompt_tokens"], &row["new_tokens"]), (&64.into(), &641.into(), &192.into()));
    assert_eq!((&row["steps"], &row["captured_steps"]), (&3.into(), &0.into()));
    let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} in {row}"));
    let seconds = number("seconds");
    let near = |got: f64, want: f64| (got / want - 1.0).abs() < 1e-6;
    assert!(near(number("tokens_per_second"), 192.0 / seconds));
    assert!(near(number("share_of_copy"), number("gb_per_second") / number("copy_gb_per_second")));
    assert!(number("tflops") > 0.0 && number("peak_memory_bytes") > 691_392.0); // the weights alone
    assert_eq!(row["tokens_hash"].as_str().unwrap().len(), 16);
    assert!(row.get("equal_requests").is_none());

    let ladder = json_lines(&run(&[&args[..], &["--workload", "tutorial,tutorial", "--ladder"]].concat()));
    let names: Vec<&str> = ladder.iter().map(|row| row["configuration"].as_str().unwrap()).collect();
    assert_eq!(names, ["padded", "padded", "ragged", "ragged", "ragged + graphs", "ragged + graphs"]);
    assert!(ladder[0].get("equal_requests").is_none());
    for row in &ladder[1..] {
        assert_eq!((&row["equal_requests"], &row["widest_near_tie"]), (&64.into(), &Value::Null));
        assert_eq!(row["tokens_hash"], rows[0]["tokens_hash"]);
    }
}

#[test]
fn bench_draws_charts_and_prints_a_table() {
    let dir = model();
    let folder = tempfile::tempdir().unwrap();
    let chart = folder.path().join("chart.svg");
    let args = ["bench", "--device", "reference", "--max-new", "2", "--model", dir.to_str().unwrap(), "--workload"];
    let bench = |more: &[&str], chart: &Path| {
        run(&[&args[..], &["tutorial", "--chart", chart.to_str().unwrap()], more].concat())
    };
    let ladder = bench(&["--ladder"], &chart);
    assert_eq!(ladder.status.code(), Some(0), "{}", String::from_utf8_lossy(&ladder.stderr));
    let table = String::from_utf8(ladder.stdout).unwrap();
    assert_eq!(table.lines().count(), 6, "{table}");
    assert!(table.contains("not measured here: the tutorial's own figures") && table.contains("12.13 s"), "{table}");
    assert!(table.contains("cut to 2 new tokens") && table.matches("64 of 64").count() == 2, "{table}");
    let svg = std::fs::read_to_string(&chart).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains(">padded<") && svg.contains(">ragged + graphs<") && svg.contains("tutorial: seconds"));
    assert_eq!(svg.matches("class=\"published\"").count(), 5);
    let peer = folder.path().join("peer.jsonl");
    let row = r#"{"workload": "tutorial", "configuration": "hf eager", "device": "here", "requests": 64,
        "prompt_tokens": 641, "new_tokens": 128, "seconds": 123.5, "tokens_per_second": 1.0}"#;
    std::fs::write(&peer, row.replace('\n', " ")).unwrap();
    let with_peer = bench(&["--ladder", "--peer", peer.to_str().unwrap()], &chart);
    assert!(String::from_utf8_lossy(&with_peer.stdout).contains("hf eager"));
    assert!(std::fs::read_to_string(&chart).unwrap().contains("123.50 s (1.00x)"));
    std::fs::remove_file(&peer).unwrap();
    assert_eq!(bench(&[], &chart).status.code(), Some(0));
    assert!(std::fs::read_to_string(&chart).unwrap().contains("tokens/s ("));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    assert_refused(&bench(&[], &folder.path().join("none").join("chart.svg")), "none");
    assert_refused(&bench(&[], folder.path()), "is a folder");
    let no_shape = ["bench", "--device", "reference", "--random", "gemma-8b", "--workload", "single"];
    assert_refused(&run(&no_shape), "gemma-8b");
}

/// The steps of the tutorial in FP8, on random weights.
#[test]
fn bench_has_rows_in_fp8_for_random_weights() {
    let args = ["bench", "--device", "reference", "--random", "gemma-3-270m", "--workload", "single", "--max-new", "2"];
    let rows = json_lines(&run(&[&args[..], &["--ladder", "--json"]].concat()));
    let names: Vec<&str> = rows.iter().map(|row| row["configuration"].as_str().unwrap()).collect();
    assert_eq!(names, ["padded", "ragged", "ragged + graphs", "FP8, cast", "FP8", "FP8, FP8 K/V"]);
    let peak = |i: usize| rows[i]["peak_memory_bytes"].as_f64().unwrap();
    assert!(peak(4) < peak(2) && peak(5) < peak(4) && peak(3) > peak(2), "{rows:?}");
    assert!(rows[1].get("equal_requests").is_some() && rows[4].get("equal_requests").is_none());
    let channel = json_lines(&run(&[&args[..], &["--recipe", "channel", "--cache", "fp8", "--json"]].concat()));
    assert_eq!(channel[0]["configuration"], "FP8 chan., K/V");
    assert_refused(&run(&[&args[..], &["--recipe", "int4"]].concat()), "static, channel or cast");
}

#[test]
fn a_checkpoint_is_calibrated_and_compared() {
    let source = support::model_with_text();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (text, out, chart) = (path("text.txt"), path("fp8"), path("amax.svg"));
    std::fs::write(&text, "It was the best of times, it was the worst of times. ".repeat(8)).unwrap();
    let model = source.path().to_str().unwrap();
    let model = ["--device", "reference", "--model", model];
    let args = ["calibrate", "--text", &text, "--window", "32", "--cache", "fp8", "--json", "--chart", &chart];
    let rows = json_lines(&run(&[&args[..], &["--out", &out], &model].concat()));
    assert!(
        rows.iter()
            .any(|row| row["tensor"] == "model.layers.0.self_attn.k_scale" && row["largest"].as_f64() > Some(0.0))
    );
    assert!(std::fs::read_to_string(&chart).unwrap().contains("<polyline"));

    let inspected = json_lines(&run(&["inspect", "--json", "--check", "--model", &out]));
    assert!(inspected[0]["stored_bytes"]["e4m3"].as_u64() > Some(0), "{}", inspected[0]);
    let compared =
        json_lines(&run(
            &[&["eval", "--json", "--file", &text, "--window", "32", "--compare", &out], &model[..]].concat()
        ));
    assert_eq!((compared.len(), compared[0]["top1"].as_f64()), (2, Some(1.0)));
    assert!(compared[1]["mean_kl"].as_f64() > Some(0.0));

    assert_refused(&run(&[&["calibrate", "--text", &text, "--out", &out], &model[..]].concat()), "is there already");
    let other = path("other");
    assert_refused(&run(&[&["calibrate", "--out", &other], &model[..]].concat()), "--text is missing");
    assert_refused(&run(&["calibrate", "--text", &text, "--out", &other, "--model", &out]), "is quantized already");
    let method = run(&[&["calibrate", "--text", &text, "--out", &other, "--method", "max"], &model[..]].concat());
    assert_refused(&method, "percentile=99.99");
}

/// A disk that is full, as a shell's limit on the size of files makes it.
#[test]
fn a_full_disk_leaves_no_checkpoint_behind() {
    let source = support::model_with_text();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fp8");
    let script = format!(
        "trap '' XFSZ; ulimit -f 60; exec {} calibrate --recipe channel --device reference --model {} --out {}",
        env!("CARGO_BIN_EXE_gemma-cuda"),
        source.path().display(),
        out.display()
    );
    let full = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_refused(&full, "File too large");
    assert!(String::from_utf8_lossy(&full.stderr).contains("fp8"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
