import { useRef, useState } from 'react'
import { useShallow } from 'zustand/react/shallow'

import { goTo, playTurn, takeBackTurn, useProjectEditorStore as useStore } from './store.ts'

export function Preview({ url }: { url: string }) {
  const frame = useRef<HTMLIFrameElement>(null)
  const [loads, setLoads] = useState(0)
  const { errors, shown, applied, playing, takeBack, files } = useStore(useShallow((state) => ({ errors: state.errors, shown: state.shown, applied: state.applied, playing: state.playing, takeBack: state.takeBack, files: state.files })))
  const state = errors.length ? `${errors.length} ${errors.length === 1 ? 'error' : 'errors'}` : shown === null ? 'no page is open' : shown >= applied ? `revision ${shown} is on the screen` : `revision ${applied} is on its way`
  return (
    <>
      <div className="bar">
        <button onClick={() => setLoads(loads + 1)}>Reload</button>
        <a href={url} target="_blank" rel="noreferrer">Open in a tab</a>
        <span className={errors.length ? 'state bad' : 'state ok'} role="status">{state}</span>
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
