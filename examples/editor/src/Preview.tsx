import { useEffect, useRef, useState } from 'react'
import { useShallow } from 'zustand/react/shallow'

import type { Session } from './project.ts'
import { readStart } from './screen.ts'
import { goTo, playTurn, takeBackTurn, useProjectEditorStore as useStore } from './store.ts'

export function Preview({ url }: { url: string }) {
  const frame = useRef<HTMLIFrameElement>(null)
  const [loads, setLoads] = useState(0)
  const { errors, shown, applied, playing, takeBack, files, starting } = useStore(useShallow((state) => ({ errors: state.errors, shown: state.shown, applied: state.applied, playing: state.playing, takeBack: state.takeBack, files: state.files, starting: state.starting })))
  const quiet = shown === null && errors.length === 0
  useEffect(() => {
    if (!quiet) return
    void readStart()
    const timer = setInterval(readStart, 3000)
    return () => clearInterval(timer)
  }, [quiet])
  const broken = quiet ? whyNot(starting) : null
  const state = broken ?? (errors.length ? `${errors.length} ${errors.length === 1 ? 'error' : 'errors'}` : shown === null ? 'no page is open yet' : shown >= applied ? `revision ${shown} is on the screen` : `revision ${applied} is on its way`)
  return (
    <>
      <div className="bar">
        <button onClick={() => setLoads(loads + 1)}>Reload</button>
        <a href={url} target="_blank" rel="noreferrer">Open in a tab</a>
        <span className={errors.length || broken ? 'state bad' : 'state ok'} title={state} role="status">{state}</span>
      </div>
      <iframe key={loads} ref={frame} src={url} title="Preview of the project" allow="clipboard-write; fullscreen" />
      {errors.length > 0 && (
        <ul className="errors" aria-label="What is wrong on the screen">
          {errors.map((error, index) => (
            <li key={index}>
              {error.file && files.has(error.file) ? (
                <button onClick={() => goTo(error.file!, error.line ?? 1, error.column ?? 1)}>
                  {error.file}
                  {error.line ? `:${error.line}:${error.column ?? 1}` : ''}
                </button>
              ) : (
                <span>{error.file ?? error.kind}</span>
              )}
              <code>{error.message}</code>
            </li>
          ))}
        </ul>
      )}
      <div className="bar">
        <span>An AI writes 40 files:</span>
        <button disabled={playing || takeBack !== null} onClick={() => playTurn(true)}>as one turn</button>
        <button disabled={playing || takeBack !== null} onClick={() => playTurn(false)}>save by save</button>
        {takeBack && <button onClick={takeBackTurn}>Take it back</button>}
      </div>
    </>
  )
}

// Of an agent's problems those that keep a preview from being served.
const FAILURES = ['install_failed', 'dev_server_failed', 'dev_server_backoff', 'nothing_to_serve', 'port_taken', 'disk_full']

/** Why there is no page, and what to do; null while the start may only take its time. */
function whyNot(session: Session | null): string | null {
  if (session?.state === 'failed' || session?.state === 'gone') return `the session is over (${session.state}): start the stack again`
  const problem = session?.agent?.problems.find(({ kind }) => FAILURES.includes(kind))
  if (!problem) return null
  const lines = (problem.detail ?? problem.kind).split('\n').filter((line) => line.trim())
  const telling = lines.find((line) => /error/i.test(line)) ?? lines[0] ?? problem.kind
  return `the project does not start: ${telling.trim()}. Save what is wrong, and it is tried again; Session says more`
}
